"""What `central serve` keeps in order beside its processes: the SuperLink's nodes follow the register of sites."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from central import serve
from central.federation import Federation
from central.registry import SiteRegistry
from central.serve import _Nodes
from sspformer.contract.errors import Refused
from sspformer.contract.supervise import Supervisor
from tests.trust import join, make_federation

Call = tuple[str, ...]


class Flwr:
    """Stands in for Flower's command: knows nodes as the SuperLink does, and does as told."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.timeouts: list[float] = []
        self.refuse: set[str] = set()
        self.hangs = False

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        _program, _noun, verb, what, *_ = command
        self.calls.append((verb, Path(what).stem))
        self.timeouts.append(float(str(options["timeout"])))
        if self.hangs:
            raise subprocess.TimeoutExpired(command, self.timeouts[-1])
        if Path(what).stem in self.refuse:
            return subprocess.CompletedProcess(command, 1, "", "no")
        return subprocess.CompletedProcess(
            command, 0, f"SuperNode {1000 + len(self.calls)} registered successfully", ""
        )


@pytest.fixture
def flwr(monkeypatch: pytest.MonkeyPatch) -> Flwr:
    made = Flwr()
    monkeypatch.setattr(serve.subprocess, "run", made)
    monkeypatch.setattr(serve, "program", lambda name: name)
    return made


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = make_federation(tmp_path / "central")
    for name in ("alpha", "bravo"):
        join(made, tmp_path / name, name)
    (made.root / "flwr").mkdir()
    (made.root / "flwr" / "superlink.db").touch()
    return made


def test_each_admitted_site_is_registered_once(federation: Federation, flwr: Flwr) -> None:
    nodes = _Nodes(federation)
    nodes.settle()
    nodes.settle()
    assert flwr.calls == [("register", "alpha"), ("register", "bravo")]
    _Nodes(federation).settle()  # and it is remembered on disk
    assert len(flwr.calls) == 2
    assert max(flwr.timeouts) <= 15


def test_one_site_that_is_refused_does_not_hold_up_the_next(federation: Federation, flwr: Flwr) -> None:
    flwr.refuse.add("alpha")
    nodes = _Nodes(federation)
    with pytest.raises(Refused, match="register site alpha"):
        nodes.settle()
    assert list(nodes.known or ()) == ["bravo"]
    flwr.refuse.clear()
    nodes.settle()
    assert flwr.calls[-1] == ("register", "alpha")


@pytest.mark.parametrize("damaged", ["sites", "nodes"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"alpha": 5}', b"\xff{"])
def test_a_damaged_list_is_one_line_and_is_read_again(
    federation: Federation, flwr: Flwr, damaged: str, content: bytes
) -> None:
    path = {"sites": federation.sites_path, "nodes": federation.root / "flwr" / "nodes.json"}[damaged]
    whole = path.read_bytes() if path.exists() else b"{}"
    path.write_bytes(content)
    nodes = _Nodes(federation)
    lines: list[str] = []
    supervisor = Supervisor(federation.root / "logs", say=lines.append, every=nodes.settle)
    supervisor.keep_house()
    assert len(lines) == 1
    assert lines[0].startswith("E-STATE: ")
    assert path.name in lines[0]
    path.write_bytes(whole)
    supervisor._every_due = 0.0
    supervisor.keep_house()
    assert len(lines) == 1
    assert [name for _verb, name in flwr.calls] == ["alpha", "bravo"]


def test_a_superlink_that_hangs_is_one_line(federation: Federation, flwr: Flwr) -> None:
    flwr.hangs = True
    lines: list[str] = []
    Supervisor(federation.root / "logs", say=lines.append, every=_Nodes(federation).settle).keep_house()
    assert lines == ["A program took longer than 15 s. Trying again in 1 s."]
    assert not (federation.root / "flwr" / "nodes.json").exists()


def test_the_node_of_a_removed_site_is_unregistered(federation: Federation, flwr: Flwr) -> None:
    nodes = _Nodes(federation)
    nodes.settle()
    SiteRegistry(federation.sites_path).remove("alpha")
    nodes.settle()
    nodes.settle()
    assert flwr.calls[2:] == [("unregister", "1001")]
    SiteRegistry(federation.sites_path).remove("bravo")
    _Nodes(federation).settle()  # also one that was removed while nothing was served
    assert flwr.calls[3:] == [("unregister", "1002")]
    assert (federation.root / "flwr" / "nodes.json").read_text() == "{}"


def test_a_node_that_cannot_be_unregistered_is_tried_again(federation: Federation, flwr: Flwr) -> None:
    nodes = _Nodes(federation)
    nodes.settle()
    SiteRegistry(federation.sites_path).remove("alpha")
    flwr.refuse.add("1001")
    with pytest.raises(Refused, match="unregister site alpha"):
        nodes.settle()
    flwr.refuse.clear()
    nodes.settle()
    assert list(nodes.known or ()) == ["bravo"]
