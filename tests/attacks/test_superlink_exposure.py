"""Whoever reaches the SuperLink can run code at the coordinator: it is on loopback unless the operator says otherwise.

127.0.0.2 stands for another interface of this machine: a socket bound to 127.0.0.1 does not answer there, a socket
bound to 0.0.0.0 does.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from central import serve
from central.app_bundle import CONNECTION, flower_environment, prepare_flower_home, program
from central.config import CentralConfig
from central.federation import Federation
from sspformer.contract.supervise import Supervisor
from tests.trust import make_federation

ELSEWHERE = "127.0.0.2"


def reachable(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex((address, port)) == 0


def configured(folder: Path, **changes: str) -> Federation:
    """A coordinator whose gateway is open to everyone, as that of a public host is."""
    made = make_federation(folder / "central")
    made.config.model_copy(update={"bind": "0.0.0.0", **changes}).save(made.root / "central.yaml")
    return Federation.open(made.root)


@contextmanager
def superlink(federation: Federation) -> Iterator[None]:
    """The SuperLink as `central serve` starts it."""
    federation.cover_addresses()
    prepare_flower_home(federation)
    supervisor = Supervisor(federation.root / "logs", say=lambda line: None)
    try:
        supervisor.start(serve._superlink(federation))
        yield
    finally:
        supervisor.end()


def test_a_public_host_opens_its_gateway_and_not_its_superlink(tmp_path: Path) -> None:
    made = CentralConfig.make(name="demo", host="central.example.org", gateway_port=8443, superlink_port=8444)
    assert made.bind == "0.0.0.0"
    assert made.superlink_bind == "127.0.0.1"
    made.save(tmp_path / "central.yaml")
    text = (tmp_path / "central.yaml").read_text()
    assert "superlink_bind: 127.0.0.1" in text
    assert "can run code on this machine" in text
    assert CentralConfig.load(tmp_path / "central.yaml") == made
    # A file from before the key existed does not open the port either.
    (tmp_path / "central.yaml").write_text(text[: text.index("#")])
    assert CentralConfig.load(tmp_path / "central.yaml").superlink_bind == "127.0.0.1"


def test_the_superlink_is_not_reached_from_outside(tmp_path: Path) -> None:
    federation = configured(tmp_path)
    with superlink(federation):
        assert reachable("127.0.0.1", federation.config.superlink_port)
        assert not reachable(ELSEWHERE, federation.config.superlink_port)


def test_mutant_that_binds_the_superlink_like_the_gateway_is_reached(tmp_path: Path) -> None:
    federation = configured(tmp_path, superlink_bind="0.0.0.0")
    with superlink(federation):
        assert reachable(ELSEWHERE, federation.config.superlink_port)


def test_a_configured_address_works_for_our_own_programs(tmp_path: Path) -> None:
    """The connection goes to the address that is bound, and the certificate holds it."""
    federation = configured(tmp_path, superlink_bind=ELSEWHERE)
    with superlink(federation):
        assert not reachable("127.0.0.1", federation.config.superlink_port)
        listed = subprocess.run(
            [program("flwr"), "supernode", "list", CONNECTION, "--format", "json"],
            env=flower_environment(federation),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert listed.returncode == 0, listed.stdout + listed.stderr
        assert '"success": true' in listed.stdout


@pytest.mark.parametrize("address", [ELSEWHERE, "central.lan"])
def test_the_certificate_is_issued_again_only_for_a_new_address(tmp_path: Path, address: str) -> None:
    federation = configured(tmp_path)
    before = federation.server_certificate_path.read_bytes()
    federation.cover_addresses()
    assert federation.server_certificate_path.read_bytes() == before
    federation.config.model_copy(update={"superlink_bind": address}).save(federation.root / "central.yaml")
    moved = Federation.open(federation.root)
    moved.cover_addresses()
    issued = moved.server_certificate_path.read_bytes()
    assert issued != before
    moved.cover_addresses()
    assert moved.server_certificate_path.read_bytes() == issued
