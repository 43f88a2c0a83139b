"""The client app: it verifies, answers with codes only, and repeats bytes instead of rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from site_client.app import Answer, answer
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import RunPlan
from sspformer.contract.task import RoundTask, plan_digest, seal_plan, seal_task
from sspformer.contract.tensors import Delta, Shapes, decode, digest_tensors, encode, zeros

SHAPES = {"decoder.weight": (4, 3), "tail.bias": (3,)}
KEY = Ed25519PrivateKey.generate()
SECRET = "sub-MILLER at /mnt/radiology"
PLAN = RunPlan(run="test", encoder="sha256:" + 64 * "0", head="sha256:" + 64 * "1", rounds=3)
GLOBAL = zeros(SHAPES)


@dataclass
class Reply:
    update: dict[str, np.ndarray]
    metrics: Mapping[str, float | int]


@dataclass
class Site:
    folder: Path
    coordinator_key: object = field(default_factory=KEY.public_key)
    trained: list[int] = field(default_factory=list)
    finished: list[Delta] = field(default_factory=list)

    def head_shapes(self, plan: RunPlan) -> Shapes:
        return SHAPES


def train(site: Site, plan: RunPlan, number: int, delta: Mapping[str, np.ndarray]) -> Reply:
    site.trained.append(number)
    value = np.random.default_rng().normal(0, 1e-3, 3).astype(np.float32)
    return Reply({"tail.bias": value}, {"patients_bucket": 8, "steps": 3, "age": 71, "epsilon": float("nan")})


def finish(site: Site, plan: RunPlan, delta: Delta) -> None:
    site.finished.append(delta)


def task_of(plan: RunPlan = PLAN, delta: Delta = GLOBAL, **changes: object) -> RoundTask:
    fields = {"plan_digest": plan_digest(plan), "run": plan.run, "round": 1, "kind": "train"}
    return RoundTask.model_validate(fields | {"head_digest": digest_tensors(delta)} | changes)


def ask(
    site: Site, task: RoundTask, *, plan: RunPlan = PLAN, delta: Delta = GLOBAL, function: object = train
) -> Answer:
    return answer(site, seal_plan(plan, KEY), seal_task(task, KEY), encode(delta), function, finish)  # type: ignore[arg-type]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_an_update_names_every_tensor_and_only_agreed_numbers_leave(site: Site) -> None:
    said = ask(site, task_of())
    update = decode(said.tensors, SHAPES)
    assert not update["decoder.weight"].any()
    assert update["tail.bias"].any()
    assert said.metrics == {"patients_bucket": 8.0, "steps": 3.0}
    assert said.code is None


def test_the_same_task_again_repeats_the_bytes_and_trains_nothing(site: Site) -> None:
    first = ask(site, task_of())
    assert ask(site, task_of()) == first
    assert site.trained == [1]


def test_the_next_round_is_trained_and_another_head_in_the_same_round_is_not(site: Site) -> None:
    other = {name: value + np.float32(0.5) for name, value in GLOBAL.items()}
    first = ask(site, task_of())
    assert ask(site, task_of(delta=other), delta=other) == Answer(code="E-PLAN")
    second = ask(site, task_of(round=2, delta=other), delta=other)
    assert second.tensors not in (b"", first.tensors)
    assert site.trained == [1, 2]


def test_a_torn_reply_on_disk_is_not_sent(site: Site) -> None:
    ask(site, task_of())
    (kept,) = (site.folder / "replies").iterdir()
    kept.write_bytes(b'{"task": ')
    ask(site, task_of())
    assert site.trained == [1, 1]


def test_replies_are_secret_files_and_old_ones_go(site: Site) -> None:
    ask(site, task_of())
    ask(site, task_of(round=2))
    assert [path.name for path in (site.folder / "replies").iterdir()] == ["test-2.bin"]
    assert (site.folder / "replies" / "test-2.bin").stat().st_mode & 0o077 == 0
    assert (site.folder / "replies").stat().st_mode & 0o077 == 0


def test_the_final_head_is_finished_and_answered_with_nothing(site: Site) -> None:
    said = ask(site, task_of(kind="final", round=4))
    assert said == Answer()
    assert site.trained == []
    assert len(site.finished) == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"round": 4}, "E-PLAN"),  # beyond the plan
        ({"run": "other"}, "E-PLAN"),
        ({"plan_digest": "sha256:" + 64 * "2"}, "E-PLAN"),
        ({"head_digest": "sha256:" + 64 * "2"}, "E-DIGEST"),
    ],
)
def test_a_task_that_does_not_fit_its_plan_or_head_is_refused(
    site: Site, changes: dict[str, object], code: str
) -> None:
    assert ask(site, task_of(**changes)) == Answer(code=code)
    assert site.trained == []


def test_a_plan_of_another_key_is_refused(site: Site) -> None:
    other = Ed25519PrivateKey.generate()
    for plan_key, task_key in ((other, KEY), (KEY, other), (other, other)):
        said = answer(site, seal_plan(PLAN, plan_key), seal_task(task_of(), task_key), encode(GLOBAL), train, finish)  # type: ignore[arg-type]
        assert said == Answer(code="E-SIGNATURE")
    assert site.trained == []


def test_a_signed_task_is_no_plan_and_the_other_way_round(site: Site) -> None:
    plan, task = seal_plan(PLAN, KEY), seal_task(task_of(), KEY)
    assert answer(site, task, plan, encode(GLOBAL), train, finish).code == "E-SIGNATURE"  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [None, "text", 7, b"", b"{}", b"\x80\x04.", [b"a"]])
def test_what_is_no_envelope_is_refused(site: Site, plan: object) -> None:
    said = answer(site, plan, seal_task(task_of(), KEY), encode(GLOBAL), train, finish)  # type: ignore[arg-type]
    assert said == Answer(code="E-FORMAT")


def raises(error: Exception) -> object:
    def function(site: Site, plan: RunPlan, number: int, delta: Delta) -> Reply:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refused(Code.BUDGET, SECRET, SECRET), "E-BUDGET"),
        (Refused(Code.DATA, SECRET, SECRET), "E-DATA"),
        (ValueError(SECRET), "E-INTERNAL"),
        (MemoryError(SECRET), "E-INTERNAL"),
        (KeyError(SECRET), "E-INTERNAL"),
    ],
)
def test_a_failure_leaves_as_its_code_and_nothing_else(site: Site, error: Exception, code: str) -> None:
    said = ask(site, task_of(), function=raises(error))
    assert said == Answer(code=code)
    assert SECRET not in repr(said)
    assert not (site.folder / "replies").exists(), "a failure is not kept: the site may be asked again"


def bad_update(value: dict[str, np.ndarray]) -> object:
    return lambda site, plan, number, delta: Reply(value, {})


@pytest.mark.parametrize(
    "update",
    [
        {"encoder.weight": np.zeros(3, np.float32)},
        {"tail.bias": np.full(3, np.nan, np.float32)},
        {"tail.bias": np.full(3, 1e9, np.float32)},
    ],
)
def test_an_update_that_must_not_leave_does_not(site: Site, update: dict[str, np.ndarray]) -> None:
    assert ask(site, task_of(), function=bad_update(update)) == Answer(code="E-TENSORS")
