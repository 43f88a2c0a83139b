"""A coordinator signs once and asks again: old rounds, old final heads, another plan under a known name. And it signs
one thing and sends another. Each rule has a mutant that lets the attack through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from site_client import app as app_module
from site_client.app import Answer, answer
from site_client.runs import Runs
from sspformer.contract import task as task_module
from sspformer.contract.canonical import parse
from sspformer.contract.plan import RunPlan
from sspformer.contract.task import RoundTask, plan_digest, seal_plan, seal_task
from sspformer.contract.tensors import Delta, Shapes, digest_tensors, encode, zeros

SHAPES = {"tail.bias": (3,)}
KEY, MALLORY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PLAN = RunPlan(run="test", encoder="sha256:" + 64 * "0", head="sha256:" + 64 * "1", rounds=3)
LAX = PLAN.model_copy(update={"seed": 7})
REFUSED = Answer(code="E-PLAN")


@dataclass
class Reply:
    update: dict[str, np.ndarray]
    metrics: Mapping[str, float | int]


@dataclass
class Hospital:
    """A site whose training counts; every training gives other numbers, as DP noise would."""

    folder: Path
    coordinator_key: object = field(default_factory=KEY.public_key)
    trained: list[tuple[str, int]] = field(default_factory=list)
    current: str = ""

    def head_shapes(self, plan: RunPlan) -> Shapes:
        return SHAPES


def train(site: Hospital, plan: RunPlan, number: int, delta: Mapping[str, np.ndarray]) -> Reply:
    site.trained.append((plan.run, number))
    return Reply({"tail.bias": np.random.default_rng().normal(0, 1e-3, 3).astype(np.float32)}, {"steps": 3})


def finish(site: Hospital, plan: RunPlan, delta: Delta) -> None:
    site.current = f"{plan.run} {digest_tensors(delta)}"


def head(value: float) -> Delta:
    return {name: zero + np.float32(value) for name, zero in zeros(SHAPES).items()}


def ask(
    site: Hospital,
    number: int,
    kind: str = "train",
    *,
    plan: RunPlan = PLAN,
    value: float = 0.0,
    plan_key: Ed25519PrivateKey = KEY,
    task_key: Ed25519PrivateKey = KEY,
    sent: float | None = None,
    **claims: object,
) -> Answer:
    fields = {"plan_digest": plan_digest(plan), "run": plan.run, "round": number, "kind": kind}
    task = RoundTask.model_validate(fields | {"head_digest": digest_tensors(head(value))} | claims)
    tensors = encode(head(value if sent is None else sent))
    return answer(site, seal_plan(plan, plan_key), seal_task(task, task_key), tensors, train, finish)  # type: ignore[arg-type]


@pytest.fixture
def site(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path)


def whole_run(site: Hospital, **changes: object) -> None:
    for number in (1, 2, 3):
        assert ask(site, number, value=number / 4, **changes).tensors
    assert ask(site, 4, "final", value=1.0, **changes) == Answer()


# -- asking again ------------------------------------------------------------------------------------------------------


def old_round(site: Hospital) -> Answer:
    ask(site, 1)
    ask(site, 2, value=0.25)
    return ask(site, 1)


def many_heads_in_one_round(site: Hospital) -> Answer:
    ask(site, 1)
    return ask(site, 1, value=0.5)


def round_after_the_end(site: Hospital) -> Answer:
    ask(site, 1)
    ask(site, 4, "final", value=1.0)
    return ask(site, 2, value=0.25)


def other_plan_under_the_name(site: Hospital) -> Answer:
    ask(site, 1)
    return ask(site, 2, plan=LAX, value=0.25)


def second_final(site: Hospital) -> Answer:
    whole_run(site)
    return ask(site, 4, "final", value=2.0)


REPLAYS = [old_round, many_heads_in_one_round, round_after_the_end, other_plan_under_the_name, second_final]


@pytest.mark.parametrize("replay", REPLAYS)
def test_the_replay_is_refused(site: Hospital, replay) -> None:
    assert replay(site) == REFUSED
    assert len(site.trained) == len(set(site.trained)), "no round was trained twice"
    assert not site.current.endswith(digest_tensors(head(2.0)))


@pytest.mark.parametrize("replay", REPLAYS)
def test_the_replay_is_refused_after_a_restart(site: Hospital, monkeypatch, replay) -> None:
    """Everything that the refusal needs is on the disk: each task goes to a site that was opened anew."""
    monkeypatch.setitem(globals(), "answer", lambda site, *rest: app_module.answer(Hospital(site.folder), *rest))
    assert replay(site) == REFUSED


@pytest.mark.parametrize("replay", REPLAYS)
def test_mutant_without_the_record_the_replay_works(site: Hospital, monkeypatch, replay) -> None:
    monkeypatch.setattr(Runs, "check", lambda runs, task, is_kept=False: None)
    monkeypatch.setattr(Runs, "is_delivered", lambda runs, task: False)
    assert replay(site).code is None
    assert len(site.trained) > len(set(site.trained)) or site.current or replay is other_plan_under_the_name


def test_an_old_final_head_does_not_come_back(site: Hospital) -> None:
    whole_run(site)
    newer = PLAN.model_copy(update={"run": "newer"})
    whole_run(site, plan=newer)
    assert ask(site, 4, "final", value=1.0) == Answer()  # answered, as any repeat, and without effect
    assert site.current.startswith("newer ")


def test_mutant_the_old_final_head_comes_back(site: Hospital, monkeypatch) -> None:
    monkeypatch.setattr(Runs, "is_delivered", lambda runs, task: False)
    whole_run(site)
    whole_run(site, plan=PLAN.model_copy(update={"run": "newer"}))
    ask(site, 4, "final", value=1.0)
    assert site.current.startswith("test ")


def test_a_damaged_record_is_no_new_run(site: Hospital) -> None:
    ask(site, 1)
    ask(site, 2, value=0.25)
    (record,) = (site.folder / "runs").iterdir()
    for damage in (b"", b"{}", b'{"plan": ', record.read_bytes().replace(b'"trained":2', b'"trained":-2')):
        record.write_bytes(damage)
        assert ask(site, 1) == Answer(code="E-STATE")
    assert len(site.trained) == 2


# -- what must go on working -------------------------------------------------------------------------------------------


def test_a_resumed_run_repeats_bytes_and_goes_on(site: Hospital) -> None:
    first = ask(site, 1)
    assert ask(site, 1) == first  # the reply was lost on the way
    assert ask(site, 3, value=0.75).tensors  # this site was away in round 2
    assert ask(site, 4, "final", value=1.0) == ask(site, 4, "final", value=1.0) == Answer()
    assert site.trained == [("test", 1), ("test", 3)]


def test_a_crash_before_the_reply_was_kept_trains_the_round_again(site: Hospital, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(app_module, "_keep", lambda *_: 1 / 0)
        assert ask(site, 1) == Answer(code="E-INTERNAL")
    assert ask(site, 1).tensors
    assert site.trained == [("test", 1), ("test", 1)]


def test_a_crash_in_the_next_round_leaves_the_last_reply_good(site: Hospital, monkeypatch) -> None:
    """Round 2 is noted and its reply is not kept: a coordinator that lost round 1 still gets its very bytes."""
    first = ask(site, 1)
    with monkeypatch.context() as patch:
        patch.setattr(app_module, "_keep", lambda *_: 1 / 0)
        assert ask(site, 2, value=0.25) == Answer(code="E-INTERNAL")
    assert ask(site, 1) == first
    assert ask(site, 1, value=0.5) == REFUSED  # any other round 1 stays refused
    assert site.trained == [("test", 1), ("test", 2)]


def test_a_refused_round_binds_the_name_to_nothing(site: Hospital, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "train", lambda *_: 1 / 0)
    assert ask(site, 1).code == "E-INTERNAL"
    monkeypatch.undo()
    assert ask(site, 1, plan=LAX).tensors


def test_records_are_for_the_owner_alone(site: Hospital) -> None:
    whole_run(site)
    assert (site.folder / "runs").stat().st_mode & 0o077 == 0
    assert (site.folder / "runs" / "test.json").stat().st_mode & 0o077 == 0


# -- signing one thing and sending another -----------------------------------------------------------------------------

FORGERIES = {
    "the plan is another key's": ({"plan_key": MALLORY}, "E-SIGNATURE"),
    "the task is another key's": ({"task_key": MALLORY}, "E-SIGNATURE"),
    "the task is for another plan": ({"plan_digest": plan_digest(LAX)}, "E-PLAN"),
    "the task is for another run": ({"run": "other"}, "E-PLAN"),
    "the head is not the one that was signed": ({"sent": 9.0}, "E-DIGEST"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_the_forgery_is_refused(site: Hospital, name: str) -> None:
    changes, code = FORGERIES[name]
    assert ask(site, 1, **changes) == Answer(code=code)  # type: ignore[arg-type]
    assert site.trained == []


def unverified(envelope: bytes, kind: str, trusted: object) -> dict[str, object]:
    return parse(envelope, "the envelope", max_bytes=1 << 20)["payload"]


def unbound(envelope: bytes, trusted: object, plan: RunPlan) -> RoundTask:
    return RoundTask.model_validate(unverified(envelope, "round", trusted))


@pytest.mark.parametrize("name", FORGERIES)
def test_mutant_without_the_rule_the_forgery_works(site: Hospital, monkeypatch, name: str) -> None:
    if "key" in name:
        monkeypatch.setattr(task_module, "verify", unverified)
    elif "task" in name:
        monkeypatch.setattr(app_module, "open_task", unbound)
    else:
        monkeypatch.setattr(app_module, "digest_tensors", lambda delta: digest_tensors(head(0.0)))
    changes, _ = FORGERIES[name]
    assert ask(site, 1, **changes).tensors  # type: ignore[arg-type]
    assert site.trained == [("test", 1)]
