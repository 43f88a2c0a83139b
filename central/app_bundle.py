"""What Flower's programs at the coordinator need on disk: their home, the connection, and a bundle without code."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from central.federation import Federation
from sspformer.contract.durable import make_private_folder, write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.supervise import quiet_environment

CONNECTION = "coordinator"
STATE_VARIABLE = "SSPFORMER_CENTRAL_STATE"
# The bundle names the server app of the installed distribution and holds nothing else. The client app is named because
# Flower demands it; no site imports what a bundle names.
_BUNDLE = """\
[project]
name = "sspformer-run"
version = "1.0.0"
description = "Starts the rounds of a run. Holds no code."

[tool.flwr.app]
publisher = "sspformer"

[tool.flwr.app.components]
serverapp = "central.app:app"
clientapp = "site_client.app:app"

[tool.flwr.app.config]
run = ""
"""


def prepare_flower_home(federation: Federation) -> None:
    """Write the connection to the SuperLink and the bundle into the coordinator's folder."""
    make_private_folder(federation.root / "flwr")
    connection = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{federation.config.superlink_address}:{federation.config.superlink_port}"\n'
        f'root-certificates = "{federation.ca_certificate_path}"\n'
    )
    write_file(federation.root / "flwr" / "config.toml", connection.encode())
    bundle_folder(federation).mkdir(exist_ok=True)
    write_file(bundle_folder(federation) / "pyproject.toml", _BUNDLE.encode())


def bundle_folder(federation: Federation) -> Path:
    """Where the bundle's project lies."""
    return federation.root / "flwr" / "bundle"


def flower_environment(federation: Federation) -> dict[str, str]:
    """Environment of Flower's programs: their home and the coordinator's folder, no telemetry, no proxy."""
    return quiet_environment(FLWR_HOME=str(federation.root / "flwr"), **{STATE_VARIABLE: str(federation.root)})


def program(name: str) -> str:
    """One of Flower's programs, from the environment that this process runs in.

    Raises:
        Refused: E-CONFIG, it is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Refused(Code.CONFIG, f"Flower's program {name} is not installed.", "Install: sspformer-onsite[central]")
    return found
