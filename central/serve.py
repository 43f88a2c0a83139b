"""`central serve`: the coordinator's processes, until told to stop.

The gateway hands out artifacts; the SuperLink keeps nodes, runs and messages; the SuperExec starts the server app of a
submitted run. The last two are Flower's own programs in process isolation, with a shared secret and SQLite state.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from central.app_bundle import CONNECTION, flower_environment, prepare_flower_home, program
from central.federation import Federation
from central.registry import SiteRegistry
from sspformer.contract.durable import read_secret, write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.supervise import Child, Supervisor, check_port_is_free, wait_for_port


def serve(root: Path) -> None:
    """Run the coordinator in the foreground. SIGTERM or Ctrl-C ends it and leaves no process.

    Raises:
        Refused: E-CONFIG, E-STATE, or E-PORT when a port is taken.
    """
    federation = Federation.open(root.absolute())
    config = federation.config
    check_port_is_free(config.bind, config.gateway_port, "gateway_port")
    check_port_is_free(config.bind, config.superlink_port, "superlink_port")
    read_secret(federation.superexec_secret_path, "the secret of SuperLink and SuperExec")
    prepare_flower_home(federation)
    nodes = _Nodes(federation)
    supervisor = Supervisor(federation.root / "logs", every=nodes.register_new)
    try:
        supervisor.start(_superlink(federation))
        nodes.register_new()
        supervisor.start(_superexec(federation))
        supervisor.start(_gateway(federation))
        print(
            f"Coordinator of {config.name} is up: gateway {config.host}:{config.gateway_port}, "
            f"SuperLink {config.host}:{config.superlink_port}, {len(nodes.known)} sites. Stop it with Ctrl-C.",
            flush=True,
        )
        supervisor.run()
    finally:
        supervisor.end()


def _superlink(federation: Federation) -> Child:
    config = federation.config
    return Child(
        name="superlink",
        command=[
            *(program("flower-superlink"), "--host", config.bind, "--port", str(config.superlink_port)),
            *("--ssl-certfile", str(federation.server_certificate_path)),
            *("--ssl-keyfile", str(federation.server_key_path)),
            *("--ssl-ca-certfile", str(federation.ca_certificate_path)),
            *("--enable-supernode-auth", "--database", str(federation.root / "flwr" / "superlink.db")),
            *("--isolation", "process", "--superexec-auth-secret-file", str(federation.superexec_secret_path)),
            "--disable-runtime-dependency-installation",
        ],
        environment=flower_environment(federation),
        ready=wait_for_port(_local(config.bind), config.superlink_port),
    )


def _superexec(federation: Federation) -> Child:
    return Child(
        name="superexec",
        command=[
            *(program("flower-superexec"), "--runtime-api-address", f"localhost:{federation.config.superlink_port}"),
            *("--root-certificates", str(federation.ca_certificate_path)),
            *("--superexec-auth-secret-file", str(federation.superexec_secret_path)),
        ],
        environment=flower_environment(federation) | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"},
    )


def _gateway(federation: Federation) -> Child:
    return Child(
        name="gateway",
        command=[sys.executable, "-m", "central.gateway", str(federation.root)],
        environment=flower_environment(federation),
        ready=wait_for_port(_local(federation.config.bind), federation.config.gateway_port),
    )


@dataclass
class _Nodes:
    """Makes the SuperLink know the nodes of admitted sites, and of those admitted while it runs.

    Args:
        federation: the coordinator.
    """

    federation: Federation
    known: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self._path.exists() and (self.federation.root / "flwr" / "superlink.db").exists():
            self.known = json.loads(self._path.read_text())

    @property
    def _path(self) -> Path:
        return self.federation.root / "flwr" / "nodes.json"

    def register_new(self) -> None:
        """Register every admitted site that is not registered yet."""
        for site in SiteRegistry(self.federation.sites_path).sites():
            if self.known.get(site.name) == site.node_public_key:
                continue
            key = self.federation.root / "flwr" / f"{site.name}.pub"
            write_file(key, site.node_public_key.encode())
            done = subprocess.run(
                [program("flwr"), "supernode", "register", str(key), CONNECTION, "--name", site.name],
                env=flower_environment(self.federation),
                capture_output=True,
                text=True,
                timeout=60,
            )
            if done.returncode != 0 and "already" not in done.stdout + done.stderr:
                raise Refused(
                    Code.STATE,
                    f"The SuperLink does not register site {site.name}.",
                    f"Read {self.federation.root / 'logs' / 'superlink.log'}",
                )
            self.known[site.name] = site.node_public_key
            write_file(self._path, json.dumps(self.known, sort_keys=True).encode())


def _local(bind: str) -> str:
    return "127.0.0.1" if bind == "0.0.0.0" else bind  # noqa: S104
