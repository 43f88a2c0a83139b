"""Plan files, and what the coordinator's folder says without any process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from central.federation import Federation
from central.registry import Publication
from central.status import describe, export_head
from central.store import RoundRecord, RunStore, head_shapes
from central.submit import read_plan, resume_run, round_line, run_plan, runs_folder
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
