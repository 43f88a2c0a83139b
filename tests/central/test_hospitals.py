"""The hospitals of the demo join by the real commands, as two people would by phone."""

from __future__ import annotations

from pathlib import Path

from central.demo.hospitals import Hospital, join
from central.demo.processes import running
from central.registry import SiteRegistry
from sspformer.contract.keys import fingerprint
from tests.trust import make_federation


def test_hospitals_join_by_the_fingerprints_that_the_commands_print(tmp_path: Path) -> None:
    federation = make_federation(tmp_path / "coordinator")
    told = fingerprint(federation.signing_key().public_key())
    (tmp_path / "bids").mkdir()
    (tmp_path / "sites").mkdir()
    with running(tmp_path / "logs") as programs:
        for name in ("north", "east"):
            hospital = Hospital(name, tmp_path / "bids", tmp_path / "sites" / name)
            join(programs, federation.root, hospital, told)
            assert (hospital.folder / "keys" / "coordinator.pub").exists()
    assert [site.name for site in SiteRegistry(federation.sites_path).sites()] == ["north", "east"]
