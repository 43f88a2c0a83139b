"""Plan files, and what the coordinator's folder says without any process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from central import app as central_app
from central import submit
from central.app_bundle import STATE_VARIABLE
from central.federation import Federation
from central.registry import Publication
from central.status import describe, export_head
from central.store import RoundRecord, RunStore, head_shapes, open_run, runs_folder
from central.submit import read_plan, resume_run, round_line, run_plan
from sspformer.contract.artifact import read_header
from sspformer.contract.errors import Code, Refused
from sspformer.contract.task import open_plan, seal_plan
from sspformer.contract.tensors import digest_tensors
from tests.trust import join, make_federation, publish


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    made = make_federation(tmp_path / "central")
    publish(made, tmp_path / "made", size=4096)
    return made


def plan_file(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


def refusal_of(path: Path, federation: Federation) -> Refused:
    with pytest.raises(Refused) as refusal:
        read_plan(path, federation)
    assert "\n" not in str(refusal.value)
    return refusal.value


def test_digests_that_are_left_out_are_the_published_ones(tmp_path: Path, federation: Federation) -> None:
    plan = read_plan(plan_file(tmp_path, "run: one\nrounds: 2\nlocal: {steps: 7}\n"), federation)
    manifest = Publication(federation).manifest()
    assert (plan.encoder, plan.head) == (manifest.encoder.digest, manifest.head.digest)
    assert plan.local.steps == 7


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("run: one\n", "rounds"),
        ("run: one\nrounds: 0\n", "rounds"),
        ("run: One Run\nrounds: 1\n", "run"),
        ("run: one\nrounds: 1\nepochs: 3\n", "epochs"),
        ("run: one\nrounds: 1\nlocal: {step: 3}\n", "local.step"),
        ("run: one\nrounds: 1\naggregation: krum\nquorum: 2\n", "quorum >= 3"),
        ("run: one\nrounds: .nan\n", "rounds"),
        ("run: one\nrounds: 1\nprivate: {noise_multiplier: 0}\n", "private"),
    ],
)
def test_a_wrong_plan_is_refused_and_names_the_key(
    tmp_path: Path, federation: Federation, text: str, named: str
) -> None:
    refusal = refusal_of(plan_file(tmp_path, text), federation)
    assert refusal.code is Code.CONFIG
    assert named in str(refusal)
    assert "plan.yaml" in str(refusal)


def test_a_plan_for_another_head_is_refused(tmp_path: Path, federation: Federation) -> None:
    text = f"run: one\nrounds: 1\nhead: sha256:{64 * '0'}\n"
    assert refusal_of(plan_file(tmp_path, text), federation).code is Code.DIGEST


def test_a_run_without_a_served_coordinator_is_refused_and_leaves_nothing(
    tmp_path: Path, federation: Federation
) -> None:
    join(federation, tmp_path / "alpha", "alpha")
    with pytest.raises(Refused) as refusal:
        run_plan(federation.root, plan_file(tmp_path, "run: one\nrounds: 1\nquorum: 1\n"))
    assert refusal.value.code is Code.GATEWAY
    assert "central serve" in str(refusal.value)
    assert not (runs_folder(federation) / "one").exists()


def test_a_quorum_beyond_the_admitted_sites_is_refused(tmp_path: Path, federation: Federation) -> None:
    with pytest.raises(Refused, match="quorum 2"):
        run_plan(federation.root, plan_file(tmp_path, "run: one\nrounds: 1\n"))


def test_an_unknown_run_is_not_resumed(federation: Federation) -> None:
    with pytest.raises(Refused, match="There is no run nine"):
        resume_run(federation.root, "nine")


def test_status_and_export_of_an_interrupted_run(tmp_path: Path, federation: Federation) -> None:
    plan = read_plan(plan_file(tmp_path, "run: one\nrounds: 2\n"), federation)
    store = RunStore.create(runs_folder(federation) / "one", seal_plan(plan, federation.signing_key()))
    published = Publication(federation).blob_path(plan.head)
    delta = {name: np.full(shape, 0.25, np.float32) for name, shape in head_shapes(published).items()}
    record = RoundRecord(
        1, ("alpha",), {"bravo": "late"}, 2.0, {"alpha": 5}, {"alpha": 6}, 0.1, digest_tensors(delta), 0.0
    )
    store.commit(record, delta, {})
    store.set_status("running", round=2, rounds=2)

    text = "\n".join(describe(federation.root))
    assert "run one: 1 of 2 rounds, interrupted; continue with: central run" in text
    assert "bravo late" in round_line(record, 2)
    assert open_plan(store.plan, [federation.signing_key().public_key()]) == plan

    target = tmp_path / "head.safetensors"
    export_head(federation.root, "one", target)
    assert read_header(target).tensors == read_header(published).tensors
    with pytest.raises(Refused, match="no head after round 2"):
        export_head(federation.root, "one", target, after=2)


def with_round(tmp_path: Path, federation: Federation) -> Path:
    """A run with one closed round; gives where its published head lies."""
    plan = read_plan(plan_file(tmp_path, "run: one\nrounds: 2\n"), federation)
    store = RunStore.create(runs_folder(federation) / "one", seal_plan(plan, federation.signing_key()))
    published = Publication(federation).blob_path(plan.head)
    delta = {name: np.zeros(shape, np.float32) for name, shape in head_shapes(published).items()}
    store.commit(RoundRecord(1, ("alpha",), {}, 2.0, {}, {}, 0.1, digest_tensors(delta), 0.0), delta, {})
    return published


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_head_is_not_exported_on_top_of_another_published_file(
    tmp_path: Path, federation: Federation, damage: str
) -> None:
    published = with_round(tmp_path, federation)
    shapes = head_shapes(published)
    data = bytearray(published.read_bytes())
    data[-1] ^= 1
    published.write_bytes(data) if damage == "flipped" else published.unlink()
    assert damage == "gone" or head_shapes(published) == shapes
    with pytest.raises(Refused) as refusal:
        export_head(federation.root, "one", tmp_path / "head.safetensors")
    assert refusal.value.code is Code.DIGEST
    assert not (tmp_path / "head.safetensors").exists()


@pytest.mark.parametrize("name", ["../one", "runs/one", "/etc", "One", "", "one\n", "."])
def test_a_run_name_that_is_a_path_is_refused_before_it_is_one(federation: Federation, name: str) -> None:
    with pytest.raises(Refused) as refusal:
        open_run(federation, name)
    assert refusal.value.code is Code.CONFIG
    with pytest.raises(Refused):
        export_head(federation.root, name, federation.root / "out")


def test_a_folder_with_the_plan_of_another_run_is_refused(tmp_path: Path, federation: Federation) -> None:
    with_round(tmp_path, federation)
    (runs_folder(federation) / "one").rename(runs_folder(federation) / "two")
    for act in (lambda: open_run(federation, "two"), lambda: export_head(federation.root, "two", tmp_path / "out")):
        with pytest.raises(Refused) as refusal:
            act()
        assert refusal.value.code is Code.PLAN


def take_up(federation: Federation, run: str, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Call the server app as SuperExec does."""
    monkeypatch.setitem(os.environ, STATE_VARIABLE, str(federation.root))
    monkeypatch.setattr(central_app, "die_with_parent", lambda: None)
    with pytest.raises(Refused) as refusal:
        central_app.main(None, SimpleNamespace(run_config={"run": run}))
    return refusal.value


@pytest.mark.parametrize("damaged", ["plan", "sites", "head"])
def test_a_server_app_that_cannot_start_a_run_says_why_in_its_folder(
    tmp_path: Path, federation: Federation, damaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = with_round(tmp_path, federation)
    store = RunStore(runs_folder(federation) / "one")
    store.set_status("waiting", round=1, rounds=2)
    path = {"plan": store.folder / "plan.json", "sites": federation.sites_path, "head": published}[damaged]
    path.write_bytes(b"{")
    refusal = take_up(federation, "one", monkeypatch)
    status = store.status()
    assert (status["state"], status["code"], status["message"]) == ("failed", refusal.code.value, str(refusal))


def test_a_server_app_of_a_run_that_is_a_path_writes_nothing(
    tmp_path: Path, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_round(tmp_path, federation)
    before = sorted(federation.root.rglob("*"))
    assert take_up(federation, "../runs/one", monkeypatch).code is Code.CONFIG
    assert sorted(federation.root.rglob("*")) == before


def served(tmp_path: Path, federation: Federation, monkeypatch: pytest.MonkeyPatch, sites: int) -> Path:
    for name in ("alpha", "bravo", "charlie")[:sites]:
        join(federation, tmp_path / name, name)
    monkeypatch.setattr(submit, "_check_served", lambda _: None)
    return plan_file(tmp_path, "run: one\nrounds: 1\nquorum: 1\n")


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_flower_command_that_fails_or_hangs_is_one_refusal_that_names_a_log(
    tmp_path: Path, federation: Federation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = served(tmp_path, federation, monkeypatch, 1)

    def flwr(command: list[str], **options: float) -> subprocess.CompletedProcess[str]:
        if how == "hangs":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 1, "out", "\nTraceback: no")

    monkeypatch.setattr(submit.subprocess, "run", flwr)
    with pytest.raises(Refused) as refusal:
        run_plan(federation.root, path)
    assert refusal.value.code is Code.STATE
    assert "\n" not in str(refusal.value)
    assert "--resume one" in str(refusal.value)
    assert ("flwr.log" if how == "fails" else "superlink.log") in str(refusal.value)
    if how == "fails":
        assert "Traceback: no" in (federation.root / "logs" / "flwr.log").read_text()


@pytest.mark.parametrize(("sites", "warned"), [(1, True), (2, True), (3, False)])
def test_fewer_than_three_hospitals_are_warned_of(
    tmp_path: Path,
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sites: int,
    warned: bool,
) -> None:
    path = served(tmp_path, federation, monkeypatch, sites)
    monkeypatch.setattr(submit._Follower, "follow", lambda self: None)
    run_plan(federation.root, path)
    expected = (
        "with fewer than three hospitals each can work out the other's update from the global head; "
        "only differential privacy stands between them"
    )
    assert (expected in capsys.readouterr().out) == warned
    resume_run(federation.root, "one")
    assert (expected in capsys.readouterr().out) == warned
