"""Epsilon by PRV against two methods that share no code with it: PLD, and the Gaussian's closed form."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from site_client.privacy import accounting
from site_client.privacy.accounting import epsilon, noise_multiplier_for, within
from sspformer.contract.errors import Code, Refused
from sspformer.contract.privacy import MechanismEvent

DELTA = 1e-5


def event(sigma: float, q: float, steps: int) -> MechanismEvent:
    return MechanismEvent(sample_rate=q, noise_multiplier=sigma, steps=steps, clipping_norm=1.0)


def pld_epsilon(events: list[MechanismEvent], delta: float = DELTA) -> float:
    accountant = PLDAccountant()
    for e in events:
        gaussian = dp_accounting.GaussianDpEvent(e.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(e.sample_rate, gaussian), e.steps)
    return accountant.get_epsilon(delta)


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """The exact epsilon of `steps` Gaussian mechanisms at q = 1 (Balle and Wang 2018, Theorem 8)."""
    s = sigma / math.sqrt(steps)
    return brentq(
        lambda e: norm.cdf(0.5 / s - e * s) - math.exp(e) * norm.cdf(-0.5 / s - e * s) - delta, 0, 200, xtol=1e-10
    )


def random_histories() -> list[list[MechanismEvent]]:
    rng = random.Random(7)
    return [
        [
            event(round(rng.uniform(0.8, 8), 2), rng.choice([0.01, 0.05, 0.1, 0.2, 0.5]), rng.randint(1, 150))
            for _ in range(rng.randint(1, 4))
        ]
        for _ in range(6)
    ]


@pytest.mark.parametrize("history", random_histories(), ids=len)
def test_prv_agrees_with_pld_within_one_percent_and_is_not_below_it(history):
    ours, pld = epsilon(history, DELTA), pld_epsilon(history)
    assert ours == pytest.approx(pld, rel=0.01)
    # PLD is itself an upper bound, on a grid of 1e-4: the truth may be that much lower.
    assert ours >= pld - 2e-4


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 1), (4.0, 20), (30.0, 75)])
def test_without_sampling_the_closed_form_is_met(sigma, steps):
    exact = gaussian_epsilon(sigma, steps, DELTA)
    assert exact <= epsilon([event(sigma, 1.0, steps)], DELTA) <= exact * 1.01


def test_four_jobs_of_5_6_compose_to_12_and_not_to_22():
    sigma = noise_multiplier_for(5.6, DELTA, 0.2, 75)
    job = event(sigma, 0.2, 75)
    assert epsilon([job], DELTA) == pytest.approx(5.6, rel=0.01)
    four = epsilon([job] * 4, DELTA)
    assert four == pytest.approx(pld_epsilon([job] * 4), rel=0.01)
    assert four == pytest.approx(12.1, abs=0.15)


@pytest.mark.parametrize(("sigma", "expected"), [(1.31, 8), (2.65, 3), (6.72, 1)])
def test_the_published_defaults_give_what_they_say(sigma, expected):
    assert expected * 0.98 < epsilon([event(sigma, 0.2, 75)], DELTA) <= expected


def test_order_and_segments_do_not_matter():
    whole = [event(1.31, 0.2, 75), event(2.0, 0.1, 10)]
    pieces = [event(1.31, 0.2, 5)] * 7 + [event(2.0, 0.1, 10)] + [event(1.31, 0.2, 5)] * 8
    assert epsilon(pieces, DELTA) == epsilon(whole, DELTA) == epsilon(whole[::-1], DELTA)


def test_more_is_never_cheaper():
    rounds = [epsilon([event(1.31, 0.2, 5)] * n, DELTA) for n in (1, 2, 5, 15)]
    assert rounds == sorted(rounds)
    assert epsilon([event(1.31, 0.2, 5)], 1e-6) > rounds[0]


def test_nothing_costs_nothing():
    assert epsilon([], DELTA) == 0.0
    assert within([], DELTA, 1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"steps": 0},
    ],
)
def test_what_has_no_bound_is_refused_even_when_validation_was_skipped(wrong):
    unchecked = MechanismEvent.model_construct(**{**event(1.31, 0.2, 5).model_dump(), **wrong})
    for ask in (lambda: epsilon([unchecked], DELTA), lambda: within([unchecked], DELTA, 1e9)):
        with pytest.raises(Refused) as refusal:
            ask()
        assert refusal.value.code is Code.BUDGET


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_outside_its_range_is_refused(delta):
    with pytest.raises(Refused):
        epsilon([event(1.31, 0.2, 5)], delta)


def test_where_prv_gives_up_rdp_answers_from_above(monkeypatch):
    history = [event(1.31, 0.2, 33)]
    tight = epsilon(history, DELTA)
    accounting._epsilon.cache_clear()
    monkeypatch.setattr(accounting, "_prv_epsilon", lambda *args, **kwargs: None)
    loose = epsilon(history, DELTA)
    accounting._epsilon.cache_clear()
    assert tight < loose < 1.3 * tight


def test_extremes_answer_with_an_upper_bound_quickly():
    assert epsilon([event(0.01, 0.5, 1000)], DELTA) > 200
    many = [event(1 + i / 100, 0.1, 5) for i in range(200)]
    assert pld_epsilon([event(3.0, 0.1, 1000)]) < epsilon(many, DELTA) < 1.3 * pld_epsilon([event(1.0, 0.1, 1000)])


def test_the_quick_answer_never_says_yes_to_too_much():
    history = [event(1.31, 0.2, 75)]
    exact = epsilon(history, DELTA)
    assert within(history, DELTA, exact)
    assert not within(history, DELTA, exact - 1e-6)
    assert within(history, DELTA, 100.0)


@pytest.mark.parametrize(("target", "q", "steps"), [(8, 0.2, 75), (1, 0.2, 75), (3, 1.0, 10)])
def test_calibration_is_safe_and_not_wasteful(target, q, steps):
    sigma = noise_multiplier_for(target, DELTA, q, steps)
    assert epsilon([event(sigma, q, steps)], DELTA) <= target
    assert epsilon([event(sigma * 0.997, q, steps)], DELTA) > target


def test_calibration_refuses_what_cannot_be():
    for target in (0.0, -1.0, math.nan, math.inf, 1e-9):
        with pytest.raises(Refused) as refusal:
            noise_multiplier_for(target, DELTA, 0.5, 1000)
        assert refusal.value.code is Code.BUDGET


def test_a_quick_yes_loads_neither_torch_nor_opacus():
    code = (
        "import sys\n"
        "from site_client.privacy.accounting import within\n"
        "from sspformer.contract.privacy import MechanismEvent as M\n"
        "ok = within([M(sample_rate=0.2, noise_multiplier=1.31, steps=50, clipping_norm=1)], 1e-5, 8)\n"
        "sys.exit(not ok or 'torch' in sys.modules or 'opacus' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
