"""Three sites and a coordinator as real processes over TLS: they finish, and finish the same when parts are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.federation.conftest import Federation
from tests.federation.stage import SITES, Stage

pytestmark = [pytest.mark.federation, pytest.mark.timeout(400)]


def trained(stage: Stage, name: str) -> int:
    return len((stage.site(name) / "trained").read_text().split())


def test_a_run_finishes_at_every_site_and_its_rounds_are_short(federation: Federation) -> None:
    store = federation.completed("plain", rounds=4)
    records = list(store.records())
    assert [record.sites for record in records] == [SITES] * 4
    assert all(set(record.metrics["alpha"]) == {"patients_bucket", "steps"} for record in records)
    if os.getloadavg()[0] < 2 * (os.cpu_count() or 1):  # on a machine that is busy otherwise a time says nothing
        # Stock Flower with subprocess isolation takes about 10 s.
        assert min(record.seconds for record in records) < 4.0
    assert store.status()["state"] == "finished"
    final = {(federation.site(name) / "final").read_text() for name in SITES}
    assert final == {store.status()["head"]} == {records[-1].head}
    log = federation.log("plain")
    assert all(f"round {number}/4  3 sites" in log for number in range(1, 5))
    assert "finished" in log


def test_the_head_is_exported_as_one_file(federation: Federation) -> None:
    out = federation.root / "exported.safetensors"
    arguments = ("head", "export", str(federation.federation.root), "unbroken", "-o", str(out))
    assert federation.finish(federation.launch("central.cli", *arguments, log="export")) == 0
    published = load_file(federation.root / "head.safetensors")
    exported = load_file(out)
    assert {name: value.shape for name, value in exported.items()} == {n: v.shape for n, v in published.items()}
    assert all((exported[name] != published[name]).any() for name in published)


def test_a_run_of_the_same_name_is_refused_in_one_line(federation: Federation) -> None:
    process = federation.run(str(federation.plan("unbroken")), log="twice")
    assert federation.finish(process) == 2
    said = federation.log("twice").strip()
    assert said.startswith("E-STATE")
    assert "--resume unbroken" in said
    assert "\n" not in said


def test_kill_9_of_the_server_app_in_a_round(federation: Federation) -> None:
    before = trained(federation, "bravo")
    hold = federation.hold("alpha")
    run = federation.run(str(federation.plan("no-app", rounds=2)), log="no-app")
    federation.wait_in_round("alpha", run)
    federation.kill("flwr-serverapp")
    hold.unlink()
    assert federation.finish(run) == 0, federation.logs()
    assert "continuing after round 0" in federation.log("no-app")
    store = federation.store("no-app")
    assert [record.sites for record in store.records()] == [SITES] * 2
    assert store.status()["head"] == federation.unbroken
    assert trained(federation, "bravo") == before + 2, "a round whose reply was kept is not trained twice"


def test_kill_9_of_a_worker_in_a_round(federation: Federation) -> None:
    hold = federation.hold("alpha")
    run = federation.run(str(federation.plan("no-worker", rounds=2)), log="no-worker")
    federation.wait_in_round("alpha", run)
    federation.kill("tests.federation.trivial", str(federation.site("alpha")))
    hold.unlink()
    assert federation.finish(run) == 0, federation.logs()
    store = federation.store("no-worker")
    assert [record.sites for record in store.records()] == [SITES] * 2
    assert store.status()["head"] == federation.unbroken


def test_kill_9_of_a_supernode_in_a_round(federation: Federation) -> None:
    hold = federation.hold("bravo")
    run = federation.run(str(federation.plan("no-node", rounds=2)), log="no-node")
    federation.wait_in_round("bravo", run)
    federation.kill("site_client.supernode", str(federation.site("bravo")))
    hold.unlink()
    assert federation.finish(run) == 0, federation.logs()
    store = federation.store("no-node")
    assert [record.sites for record in store.records()] == [SITES] * 2
    assert store.status()["head"] == federation.unbroken


def test_kill_9_of_the_coordinator_in_a_round_and_resume(federation: Federation) -> None:
    hold = federation.hold("charlie")
    run = federation.run(str(federation.plan("no-central", rounds=2)), log="no-central")
    federation.wait_in_round("charlie", run)
    run.kill()
    run.wait()
    central = str(federation.federation.root)
    os.kill(federation.coordinator.pid, signal.SIGKILL)
    federation.coordinator.wait()
    federation.wait(lambda: not federation.processes(central), 15)
    hold.unlink()
    federation.coordinator = federation.serve()
    assert federation.finish(federation.run("--resume", "no-central", log="resumed")) == 0, federation.logs()
    store = federation.store("no-central")
    assert [record.sites for record in store.records()] == [SITES] * 2
    assert store.status()["head"] == federation.unbroken


def test_kill_9_of_a_site_leaves_no_process_and_the_others_finish(federation: Federation) -> None:
    site = str(federation.site("charlie"))
    os.kill(federation.sites["charlie"].pid, signal.SIGKILL)
    federation.sites["charlie"].wait()
    federation.wait(lambda: not federation.processes(site), 15)
    store = federation.completed("two-sites", rounds=1, deadline_s=20.0)
    assert [record.sites for record in store.records()] == [("alpha", "bravo")]
    federation.start_missing_sites()


def test_a_clean_stop_leaves_no_process(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ["alpha"])
    try:
        coordinator = stage.serve()
        sites = stage.start_sites(["alpha"])
        assert len(stage.processes()) >= 7  # two supervisors, SuperLink, SuperExec, gateway, SuperNode, worker
        for process in (sites["alpha"], coordinator):
            process.terminate()
            assert process.wait(15) == 0
        assert stage.processes() == {}
    finally:
        stage.close()


def test_a_taken_port_is_refused_in_one_line(federation: Federation) -> None:
    process = federation.launch("central.cli", "serve", str(federation.federation.root), log="second")
    assert federation.finish(process) == 2
    said = federation.log("second").strip()
    assert said.startswith("E-PORT")
    assert "gateway_port" in said
    assert "\n" not in said
