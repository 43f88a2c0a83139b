"""Aggregation by Flower's strategies, and what is refused before it."""

from __future__ import annotations

import numpy as np
import pytest

from central.aggregate import Aggregator, Update, norm, screen
from sspformer.contract.tensors import Delta

RULES = ["fedavg", "fedadam", "fedmedian", "fedtrimmedavg", "krum"]


def update(site: str, value: float = 0.0, noise: float = 1e-3, bucket: float = 1.0) -> Update:
    random = np.random.default_rng(list(site.encode()))
    tensors = {
        name: np.asarray(value + random.normal(0, noise, shape), np.float32)
        for name, shape in {"decoder.weight": (6, 4), "tail.bias": (4,), "tail.scale": ()}.items()
    }
    return Update(site, tensors, bucket)


def stack(updates: list[Update], name: str) -> np.ndarray:
    return np.stack([u.tensors[name] for u in updates])


def distance(first: Delta, second: Delta) -> float:
    return norm({name: first[name] - second[name] for name in first})


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_updates_does_not_change_a_bit(rule: str) -> None:
    updates = [update(site, bucket=b) for site, b in (("a", 4.0), ("b", 8.0), ("c", 64.0), ("d", 1.0))]
    first = Aggregator(rule, "clamped").step(1, updates)
    second = Aggregator(rule, "clamped").step(1, updates[::-1])
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert all(value.dtype == np.float32 for value in first.values())
    assert {name: value.shape for name, value in first.items()} == {
        name: value.shape for name, value in updates[0].tensors.items()
    }


def test_fedavg_is_the_mean_and_ignores_what_sites_say_of_their_size() -> None:
    updates = [update("a", bucket=1), update("b", bucket=1e6), update("c", bucket=3)]
    step = Aggregator("fedavg", "equal").step(1, updates)
    for name, value in step.items():
        np.testing.assert_allclose(value, stack(updates, name).mean(axis=0), atol=1e-8)


def test_clamped_weights_stay_within_a_factor_of_two_of_the_median() -> None:
    updates = [update("a", bucket=10), update("b", bucket=1e6), update("c", bucket=1)]
    step = Aggregator("fedavg", "clamped").step(1, updates)
    for name, value in step.items():
        expected = np.average(stack(updates, name), axis=0, weights=[1.0, 2.0, 0.5])
        np.testing.assert_allclose(value, expected, atol=1e-8)


def test_fedmedian_is_the_median() -> None:
    updates = [update(site) for site in "abcde"]
    step = Aggregator("fedmedian").step(1, updates)
    for name, value in step.items():
        np.testing.assert_allclose(value, np.median(stack(updates, name), axis=0), atol=1e-9)


@pytest.mark.parametrize("count", [3, 4, 5, 7, 49])
def test_fedtrimmedavg_always_cuts_at_least_one_at_each_end(count: int) -> None:
    updates = [update(f"s{number:02d}") for number in range(count - 1)] + [update("villain", value=1.0)]
    step = Aggregator("fedtrimmedavg").step(1, updates)
    assert max(np.abs(value).max() for value in step.values()) < 0.01


@pytest.mark.parametrize("rule", ["fedmedian", "fedtrimmedavg", "krum"])
@pytest.mark.parametrize("honest", [2, 4, 6])
def test_a_robust_rule_holds_where_the_mean_does_not(rule: str, honest: int) -> None:
    good = [update(f"good{number}", value=0.01) for number in range(honest)]
    updates = [*good, update("villain", value=-5.0)]
    middle = Aggregator("fedavg").step(1, good)
    assert distance(Aggregator(rule).step(1, updates), middle) < 0.02
    assert distance(Aggregator("fedavg").step(1, updates), middle) > 1.0


def test_krum_gives_one_of_the_updates() -> None:
    updates = [update(site) for site in "abcde"]
    step = Aggregator("krum").step(1, updates)
    assert min(distance(step, u.tensors) for u in updates) == pytest.approx(0, abs=1e-7)


def test_fedadam_follows_its_equations_and_carries_its_moments() -> None:
    """Reddi et al. 2021, algorithm 2 with bias correction as Flower does it."""
    eta, tau, beta1, beta2 = 3e-3, 1e-3, 0.9, 0.99
    rounds = [[update("a", 0.01), update("b", 0.02)], [update("a", -0.01), update("b", 0.03)]]
    through = Aggregator("fedadam")
    m = v = np.zeros((6, 4))
    for number, updates in enumerate(rounds, 1):
        restored = Aggregator("fedadam")
        restored.restore(through.state())
        step = through.step(number, updates)
        again = restored.step(number, updates)
        mean = stack(updates, "decoder.weight").astype(np.float64).mean(axis=0)
        m, v = beta1 * m + (1 - beta1) * mean, beta2 * v + (1 - beta2) * mean**2
        rate = eta * np.sqrt(1 - beta2 ** (number + 1.0)) / (1 - beta1 ** (number + 1.0))
        np.testing.assert_allclose(step["decoder.weight"], rate * m / (np.sqrt(v) + tau), rtol=1e-4)
        assert all(step[name].tobytes() == again[name].tobytes() for name in step)


def test_only_fedadam_remembers() -> None:
    for rule in RULES:
        aggregator = Aggregator(rule)
        aggregator.step(1, [update("a"), update("b"), update("c")])
        assert bool(aggregator.state()) == (rule == "fedadam")


@pytest.mark.parametrize("value", [np.nan, np.inf, 101.0])
def test_what_is_not_finite_or_absurd_is_refused(value: float) -> None:
    bad = update("bad")
    bad.tensors["tail.bias"][2] = value
    passed, refused = screen([update("a"), bad], 100.0)
    assert [u.site for u in passed] == ["a"]
    assert refused == {"bad": "E-TENSORS"}


def test_an_update_far_longer_than_its_peers_is_refused() -> None:
    passed, refused = screen([update("a"), update("b"), update("c"), update("long", noise=0.02)], 100.0)
    assert [u.site for u in passed] == ["a", "b", "c"]
    assert refused == {"long": "E-TENSORS"}


def test_honest_updates_of_different_lengths_pass() -> None:
    passed, refused = screen([update("a", noise=1e-3), update("b", noise=3e-3), update("c", noise=5e-3)], 100.0)
    assert len(passed) == 3
    assert refused == {}


def test_with_two_updates_nobody_is_called_strange() -> None:
    passed, refused = screen([update("a"), update("b", noise=0.5)], 100.0)
    assert len(passed) == 2
    assert refused == {}


@pytest.mark.parametrize("sites", [["long"], ["a", "long"], ["a", "b", "c", "long"]])
def test_an_update_beyond_the_plan_is_refused_however_few_there_are(sites: list[str]) -> None:
    updates = [update(site, noise=0.5 if site == "long" else 1e-3) for site in sites]
    passed, refused = screen(updates, max_norm=1.0)
    assert [u.site for u in passed] == sites[:-1]
    assert refused == {"long": "E-TENSORS"}


@pytest.mark.parametrize("idle", [1, 2, 3])
def test_sites_that_did_not_move_do_not_make_honest_ones_strange(idle: int) -> None:
    still = [update(f"still{number}", noise=0.0) for number in range(idle)]
    passed, refused = screen([*still, update("a"), update("b")], 100.0)
    assert len(passed) == idle + 2
    assert refused == {}


def test_updates_that_are_all_zero_pass() -> None:
    passed, _refused = screen([update(site, noise=0.0) for site in "abc"], 100.0)
    assert len(passed) == 3


def test_no_update_gives_no_step() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Aggregator("fedavg").step(1, [])
