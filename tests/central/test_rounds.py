"""The rounds over the in-memory federation."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from central import aggregate, rounds
from central.aggregate import norm
from central.rounds import Reply, Request, run_rounds
from sspformer.contract.errors import Code, Refused
from sspformer.contract.tensors import Delta, digest_tensors, encode
from tests.central.memory import (
    SHAPES,
    MemorySite,
    MemoryTransport,
    honest,
    honest_update,
    make_plan,
    make_run,
    says,
    silent,
)

NAMES = ("alpha", "bravo", "charlie")


def three(**changes: object) -> list[MemorySite]:
    return [MemorySite(name, **changes) for name in NAMES]  # type: ignore[arg-type]


def same(first: Delta, second: Delta) -> bool:
    return list(first) == list(second) and all(first[n].tobytes() == second[n].tobytes() for n in first)


def test_a_run_aggregates_all_sites_in_every_round_and_delivers_the_final_head(tmp_path: Path) -> None:
    sites = three()
    run = make_run(tmp_path, sites)
    head = run_rounds(run)
    records = list(run.store.records())
    assert [record.sites for record in records] == [NAMES] * 3
    assert all(site.asked == [(1, "train"), (2, "train"), (3, "train"), (4, "final")] for site in sites)
    assert all(site.final is not None and same(site.final, head) for site in sites)
    assert run.store.status()["state"] == "finished"
    assert run.store.status()["delivered"] == list(NAMES)
    assert records[-1].head == digest_tensors(head)
    assert records[0].metrics["alpha"] == {"patients_bucket": 8.0, "steps": 2.0}  # "secret" is not an agreed number


def test_the_first_step_is_the_mean_of_the_updates(tmp_path: Path) -> None:
    run = make_run(tmp_path, three(), make_plan(rounds=1))
    head = run_rounds(run)
    updates = [honest_update(name, 1, {n: np.zeros_like(v) for n, v in head.items()}) for name in NAMES]
    for name, value in head.items():
        np.testing.assert_allclose(value, np.mean([u[name] for u in updates], axis=0), atol=2e-6)


@pytest.mark.parametrize("rule", ["fedavg", "fedadam"])
@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, rule: str, killed_after: int) -> None:
    plan = make_plan(rounds=4, aggregation=rule)
    unbroken = run_rounds(make_run(tmp_path / "unbroken", three(), plan))

    class Killed(BaseException):
        pass

    def die(site: MemorySite, request: Request, delta: Delta) -> Reply:
        if request.round > killed_after:
            raise Killed
        return honest(site, request, delta)

    with pytest.raises(Killed):
        run_rounds(make_run(tmp_path / "broken", three(behaviours=[die]), plan))
    resumed = make_run(tmp_path / "broken", three(), plan)
    assert same(run_rounds(resumed), unbroken)
    assert [record.round for record in resumed.store.records()] == [1, 2, 3, 4]


def test_the_order_in_which_replies_arrive_does_not_change_a_bit(tmp_path: Path) -> None:
    heads = []
    for number, delays in enumerate(itertools.permutations((0.5, 1.5, 2.5))):
        sites = [MemorySite(name, delay_s=delay) for name, delay in zip(NAMES, delays, strict=True)]
        heads.append(run_rounds(make_run(tmp_path / str(number), sites)))
    assert all(same(head, heads[0]) for head in heads)


def test_a_finished_run_that_is_resumed_trains_nothing_again(tmp_path: Path) -> None:
    head = run_rounds(make_run(tmp_path, three()))
    sites = three()
    assert same(run_rounds(make_run(tmp_path, sites)), head)
    assert all(site.asked == [(4, "final")] for site in sites)


def test_a_failing_site_is_asked_again_and_takes_part(tmp_path: Path) -> None:
    sites = three()
    sites[1].behaviours = [says("E-INTERNAL"), honest]
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    run_rounds(run)
    assert next(iter(run.store.records())).sites == NAMES
    assert sites[1].asked[:2] == [(1, "train"), (1, "train")]


def test_a_site_that_keeps_failing_is_left_out_after_three_tries(tmp_path: Path) -> None:
    sites = three()
    sites[1].behaviours = [says("E-INTERNAL")]
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    run_rounds(run)
    record = next(iter(run.store.records()))
    assert record.sites == ("alpha", "charlie")
    assert record.missing == {"bravo": "E-INTERNAL"}
    assert sites[1].asked.count((1, "train")) == rounds.MAX_TRIES
    assert record.seconds < 20  # the deadline was not waited for


@pytest.mark.parametrize("code", ["E-PLAN", "E-BUDGET", "E-COHORT"])
def test_a_site_that_says_no_is_not_asked_again_in_the_round(tmp_path: Path, code: str) -> None:
    sites = three()
    sites[2].behaviours = [says(code)]
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    run_rounds(run)
    assert next(iter(run.store.records())).missing == {"charlie": code}
    assert sites[2].asked.count((1, "train")) == 1


def test_a_text_in_place_of_a_code_is_neither_shown_nor_kept(tmp_path: Path) -> None:
    sites = three()
    sites[2].behaviours = [says("ValueError: /data/sub-MILLER")]
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    run_rounds(run)
    assert all("MILLER" not in path.read_text(errors="replace") for path in tmp_path.iterdir())


def test_a_site_whose_connection_is_new_is_asked_again(tmp_path: Path) -> None:
    sites = three()
    sites[0].behaviours = [silent, honest]
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    run.clock.at.append((5.0, lambda: setattr(sites[0], "stamp", "second")))  # type: ignore[attr-defined]
    run_rounds(run)
    assert next(iter(run.store.records())).sites == NAMES


def test_the_deadline_closes_a_round_with_the_quorum(tmp_path: Path) -> None:
    sites = three()
    sites[0].behaviours = [silent]
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    run_rounds(run)
    record = next(iter(run.store.records()))
    assert record.sites == ("bravo", "charlie")
    assert record.missing == {"alpha": "late"}
    assert 60 <= record.seconds < 62


def test_a_site_that_never_connects_costs_its_grace_once(tmp_path: Path) -> None:
    sites = three()
    sites[0].online_from = float("inf")
    run = make_run(tmp_path, sites)
    run_rounds(run)
    seconds = [record.seconds for record in run.store.records()]
    assert rounds.OFFLINE_GRACE_S <= seconds[0] < 60
    assert max(seconds[1:]) < 5


def test_a_site_that_connects_late_takes_part(tmp_path: Path) -> None:
    sites = three()
    sites[0].online_from = 10.0
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    run_rounds(run)
    assert next(iter(run.store.records())).sites == NAMES


def test_the_final_head_is_not_held_up_by_a_site_that_was_not_in_the_last_round(tmp_path: Path) -> None:
    sites = three()
    sites[2].behaviours = [says("E-BUDGET")]
    sites[2].delay_s = 20.0
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    began_final: list[float] = []
    run = replace(run, say=lambda text: began_final.append(run.clock.now()))
    run_rounds(run)
    assert run.clock.now() - began_final[0] < 5
    assert run.store.status()["delivered"] == ["alpha", "bravo"]
    assert sites[2].asked[-1] == (2, "final")


def test_below_quorum_the_run_fails_with_a_code_and_can_be_resumed(tmp_path: Path) -> None:
    sites = three(behaviours=[silent])
    sites[0].behaviours = [honest]
    run = make_run(tmp_path, sites, make_plan(quorum=2))
    with pytest.raises(Refused) as refusal:
        run_rounds(run)
    assert refusal.value.code is Code.QUORUM
    assert "bravo late" in str(refusal.value)
    assert "--resume test" in str(refusal.value)
    assert run.store.status()["state"] == "failed"
    unbroken = run_rounds(make_run(tmp_path / "unbroken", three()))
    assert same(run_rounds(make_run(tmp_path, three())), unbroken)


def test_when_every_site_says_no_the_run_fails_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, three(behaviours=[says("E-PLAN")]))
    with pytest.raises(Refused):
        run_rounds(run)
    assert run.clock.now() < 5


def poison(value: float) -> object:
    def behave(site: MemorySite, request: Request, delta: Delta) -> Reply:
        update = {name: np.full_like(tensor, value) for name, tensor in delta.items()}
        return Reply(site.name, request.task, encode(update), {})

    return behave


def garbage(site: MemorySite, request: Request, delta: Delta) -> Reply:
    return Reply(site.name, request.task, b"\x80\x04garbage", {})


def wrong_shape(site: MemorySite, request: Request, delta: Delta) -> Reply:
    return Reply(site.name, request.task, encode({"tail.bias": np.zeros(3, np.float32)}), {})


def not_finite(site: MemorySite, request: Request, delta: Delta) -> Reply:
    blob = bytearray(encode({name: np.zeros_like(tensor) for name, tensor in delta.items()}))
    return Reply(site.name, request.task, _with_infinity(bytes(blob), delta), {})


def _with_infinity(blob: bytes, delta: Delta) -> bytes:
    """A frame in which every value is fp16 infinity; `encode` refuses to make one."""
    import zstandard

    count = sum(tensor.size for tensor in delta.values())
    planes = bytes(count) + b"\x7c" * count
    frame = zstandard.ZstdCompressor().compress(planes)
    return blob[: blob.index(b"\x28\xb5\x2f\xfd")] + frame


@pytest.mark.parametrize("behave", [poison(50.0), poison(1000.0), garbage, wrong_shape, not_finite])
def test_an_update_that_cannot_be_right_is_refused_before_aggregation(tmp_path: Path, behave: object) -> None:
    sites = [*three(), MemorySite("mallory", [behave])]  # type: ignore[list-item]
    run = make_run(tmp_path / "attacked", sites, make_plan(rounds=1))
    head = run_rounds(run)
    assert next(iter(run.store.records())).missing == {"mallory": "E-TENSORS"}
    assert same(head, run_rounds(make_run(tmp_path / "clean", three(), make_plan(rounds=1))))


def bloated(site: MemorySite, request: Request, delta: Delta) -> Reply:
    return Reply(site.name, request.task, honest(site, request, delta).tensors + bytes(1 << 20), {})


def test_a_reply_that_is_too_large_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    real = rounds.decode
    monkeypatch.setattr(rounds, "decode", lambda data, shapes: (decoded.append(len(data)), real(data, shapes))[1])
    sites = [*three(), MemorySite("mallory", [bloated])]
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    run_rounds(run)
    assert next(iter(run.store.records())).missing == {"mallory": "E-TENSORS"}
    assert len(decoded) == 3
    assert max(decoded) <= rounds.largest_reply(run.shapes)


def test_updates_that_do_not_compress_are_within_the_bound() -> None:
    shapes = {"layer.weight": (300, 301)}
    noise = np.random.default_rng(1).integers(0, 31_000, 300 * 301, np.uint16).view(np.float16).astype(np.float32)
    size = len(encode({"layer.weight": noise.reshape(300, 301)}))
    assert 0.9 * rounds.largest_reply(shapes) < size <= rounds.largest_reply(shapes)


def scaled(factor: float, patients: float = 8) -> object:
    def behave(site: MemorySite, request: Request, delta: Delta) -> Reply:
        update = honest_update(site.name, request.round, delta)
        sent = {name: np.asarray(factor * value, np.float32) for name, value in update.items()}
        return Reply(site.name, request.task, encode(sent), {"patients_bucket": patients, "steps": 2})

    return behave


def two_sites(folder: Path, behave: object) -> tuple[Delta, dict[str, str]]:
    """One round of an honest site and another, with a plan that allows ten times an honest update."""
    sites = [MemorySite("alpha"), MemorySite("mallory", [behave])]  # type: ignore[list-item]
    run = make_run(folder, sites, make_plan(rounds=1, quorum=1, max_update_norm=0.05))
    return run_rounds(run), next(iter(run.store.records())).missing


def alone(folder: Path) -> Delta:
    return run_rounds(make_run(folder, [MemorySite("alpha")], make_plan(rounds=1, quorum=1)))


def test_an_update_a_hundred_times_too_long_is_refused_with_two_sites(tmp_path: Path) -> None:
    head, missing = two_sites(tmp_path / "attacked", scaled(100.0))
    assert missing == {"mallory": "E-TENSORS"}
    assert same(head, alone(tmp_path / "clean"))


def test_mutant_without_the_plans_bound_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = rounds.screen
    monkeypatch.setattr(rounds, "screen", lambda updates, max_norm: screen(updates, float("inf")))
    head, missing = two_sites(tmp_path / "attacked", scaled(100.0))
    assert missing == {}
    assert norm(head) > 10 * norm(alone(tmp_path / "clean"))


@pytest.mark.parametrize(
    ("aggregation", "weights"), [("fedavg", "clamped"), ("fedavg", "equal"), ("fedmedian", "equal")]
)
def test_a_flipped_sign_and_a_claim_of_a_billion_patients_weigh_at_most_twice(
    tmp_path: Path, aggregation: str, weights: str
) -> None:
    plan = make_plan(rounds=1, quorum=3, aggregation=aggregation, weights=weights)
    start = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for number, patients in enumerate((1e9, 1e6, float("inf"), float("nan"), -1.0)):
        sites = [*three(), MemorySite("mallory", [scaled(-1.0, patients)])]  # type: ignore[list-item]
        run = make_run(tmp_path / str(number), sites, plan)
        head = run_rounds(run)
        assert next(iter(run.store.records())).missing == {}
        updates = {name: honest_update(name, 1, start) for name in (*NAMES, "mallory")}
        # The three honest sites weigh the same, the liar from half to twice of that: more would leave this range.
        for name, value in head.items():
            honest_sum = sum(updates[site][name] for site in NAMES)
            ends = [(honest_sum - w * updates["mallory"][name]) / (3 + w) for w in (0.5, 2.0)]
            if aggregation == "fedavg":
                assert (value >= np.minimum(*ends) - 1e-5).all()
                assert (value <= np.maximum(*ends) + 1e-5).all()
            else:
                assert np.abs(value).max() <= max(np.abs(u[name]).max() for u in updates.values())


def test_mutant_that_believes_the_claim_is_carried_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "_weights", lambda buckets, kind: list(buckets))
    plan = make_plan(rounds=1, weights="clamped")
    sites = [*three(), MemorySite("mallory", [scaled(-1.0, 1e6)])]  # type: ignore[list-item]
    head = run_rounds(make_run(tmp_path, sites, plan))
    flipped = honest_update("mallory", 1, {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
    assert norm({name: head[name] + flipped[name] for name in head}) < 1e-4  # the head is the liar's update


def test_sites_that_send_zero_take_part_and_refuse_nobody(tmp_path: Path) -> None:
    sites = three()
    sites[0].behaviours = sites[1].behaviours = [scaled(0.0)]  # type: ignore[list-item,assignment]
    run = make_run(tmp_path, sites, make_plan(rounds=2))
    run_rounds(run)
    assert [record.sites for record in run.store.records()] == [NAMES] * 2


def test_a_reply_to_another_round_is_not_taken(tmp_path: Path) -> None:
    """A replayed reply of round 1 must not count in round 2."""
    kept: list[Reply] = []

    def replay(site: MemorySite, request: Request, delta: Delta) -> Reply | None:
        if request.round == 1:
            kept.append(honest(site, request, delta))
            return kept[0]
        return replace(kept[0])

    sites = three()
    sites[0].behaviours = [replay]  # type: ignore[list-item]
    run = make_run(tmp_path, sites, make_plan(rounds=2))
    run_rounds(run)
    assert [record.sites for record in run.store.records()] == [NAMES, ("bravo", "charlie")]


def test_a_reply_that_comes_twice_counts_once(tmp_path: Path) -> None:
    class Twice(MemoryTransport):
        def receive(self) -> list[Reply]:
            return [copy for reply in super().receive() for copy in (reply, reply)]

    sites = three()
    run = make_run(tmp_path / "twice", sites)
    run = replace(run, transport=Twice(sites, run.clock))  # type: ignore[arg-type]
    assert same(run_rounds(run), run_rounds(make_run(tmp_path / "once", three())))


def test_a_stranger_is_not_heard(tmp_path: Path) -> None:
    class WithStranger(MemoryTransport):
        def receive(self) -> list[Reply]:
            return [copy for reply in super().receive() for copy in (replace(reply, site="stranger"), reply)]

    sites = three()
    run = make_run(tmp_path, sites, make_plan(rounds=1))
    run_rounds(replace(run, transport=WithStranger(sites, run.clock)))  # type: ignore[arg-type]
    assert next(iter(run.store.records())).sites == NAMES
