"""Epsilon as a pure function of mechanism events.

PRV (Gopi et al. 2021, as in Opacus) gives the answer: an upper bound, tight to a stated error. RDP (Mironov 2017, as in
dp-accounting) is a looser upper bound that costs milliseconds: it answers where it is enough and where PRV cannot.
GDP is an approximation from below and is not used.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from sspformer.contract.errors import Code, Refused
from sspformer.contract.privacy import MechanismEvent

# One entry per distinct (noise multiplier, sample rate), with the steps added up: composition does not mind the order.
_Grouped = tuple[tuple[float, float, int], ...]

# The stated error: PRV's answer lies above the true epsilon by at most two of these (Gopi et al., Theorem 5.5).
RELATIVE_ERROR = 0.002
_LEAST_ERROR = 1e-4
_MOST_ERROR = 0.05

# Beyond these PRV's grid costs minutes or gigabytes. No budget reaches such an epsilon, and RDP stays an upper bound.
_PRV_MAX_EPSILON = 200.0
_PRV_MAX_PAIRS = 24

_MAX_NOISE_MULTIPLIER = 1e4


def epsilon(events: Iterable[MechanismEvent], delta: float) -> float:
    """Epsilon per patient of everything in `events` together, at `delta`: an upper bound.

    Every event is taken to have touched every patient of the site, so this is the worst patient's epsilon.

    Args:
        events: what was done, in any order; no event costs nothing.
        delta: the delta of the (epsilon, delta) statement.

    Raises:
        Refused: E-BUDGET where no bound exists (no noise, a rate outside (0, 1], a delta outside (0, 1)).
    """
    return _epsilon(_grouped(events), _checked_delta(delta))


def within(events: Iterable[MechanismEvent], delta: float, max_epsilon: float) -> bool:
    """Whether `events` together stay within `max_epsilon`. Quick: asks PRV only where RDP alone cannot say yes.

    Raises:
        Refused: as `epsilon`.
    """
    grouped, delta = _grouped(events), _checked_delta(delta)
    return not grouped or _rdp_epsilon(grouped, delta) <= max_epsilon or _epsilon(grouped, delta) <= max_epsilon


def noise_multiplier_for(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """A noise multiplier, rounded up to three decimals, that keeps `steps` within `epsilon`: within 0.1% of the least.

    Args:
        epsilon: the budget of the steps together.
        delta: the delta of the (epsilon, delta) statement.
        sample_rate: Poisson rate q of every step.
        steps: all steps of the run: rounds times steps per round.

    Raises:
        Refused: E-BUDGET where no noise multiplier up to 10,000 is enough, or as `epsilon()`.
    """
    if not epsilon > 0 or math.isinf(epsilon):
        raise _unsupported(f"a target epsilon of {epsilon:g}")
    delta = _checked_delta(delta)

    def one(noise_multiplier: float) -> _Grouped:
        return _grouped_pairs([(noise_multiplier, sample_rate, steps)])

    if _rdp_epsilon(one(_MAX_NOISE_MULTIPLIER), delta) > epsilon:
        raise Refused(
            Code.BUDGET,
            f"no noise multiplier up to {_MAX_NOISE_MULTIPLIER:g} keeps {steps} steps within epsilon {epsilon:g}.",
            "ask for fewer steps, a smaller sample rate or a larger epsilon.",
        )
    # RDP brackets cheaply from above; PRV then finds the answer, which lies a little below.
    enough = _bisect(lambda sigma: _rdp_epsilon(one(sigma), delta) <= epsilon, 1e-2, _MAX_NOISE_MULTIPLIER)
    too_little = enough
    while _epsilon(one(too_little), delta) <= epsilon and too_little > 1e-2:
        enough, too_little = too_little, too_little * 0.85
    enough = _bisect(lambda sigma: _epsilon(one(sigma), delta) <= epsilon, too_little, enough)
    return math.ceil(enough * 1000) / 1000


def _bisect(is_enough: Callable[[float], bool], too_little: float, enough: float) -> float:
    """The boundary between `too_little` and `enough`, from the safe side, to 3e-4 of itself."""
    while enough > too_little * (1 + 3e-4):
        middle = math.sqrt(too_little * enough)
        if is_enough(middle):
            enough = middle
        else:
            too_little = middle
    return enough


@lru_cache(maxsize=4096)
def _epsilon(grouped: _Grouped, delta: float) -> float:
    if not grouped:  # PRV fails on an empty history
        return 0.0
    rdp = _rdp_epsilon(grouped, delta)
    if len(grouped) > _PRV_MAX_PAIRS or not rdp <= _PRV_MAX_EPSILON:
        return rdp
    prv = _prv_epsilon(grouped, delta, error=min(max(RELATIVE_ERROR * rdp, _LEAST_ERROR), _MOST_ERROR))
    return rdp if prv is None else min(prv, rdp)  # both are upper bounds


def _prv_epsilon(grouped: _Grouped, delta: float, error: float) -> float | None:
    """PRV's upper bound, or None where its arithmetic gives up."""
    import numpy as np
    from opacus.accountants import PRVAccountant  # slow to import: it brings torch

    accountant = PRVAccountant()
    # Set, not stepped: stepping would walk every single step, and the history's length counts segments.
    accountant.history = list(grouped)
    # Warnings: the RDP estimate that sizes the grid is at the edge of its orders (still an upper bound), and log(1 - q)
    # at q = 1 is minus infinity, as it should be.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            answer = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta / 1000))
        except (RuntimeError, ValueError, ArithmeticError):
            return None
    return answer if math.isfinite(answer) and answer >= 0 else None


def _rdp_epsilon(grouped: _Grouped, delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    if not grouped:
        return 0.0
    total = sum(steps * _rdp_curve(sigma, rate) for sigma, rate, steps in grouped)
    answer, _ = compute_epsilon(_orders(), total, delta)
    return float(answer)


@lru_cache(maxsize=4096)
def _rdp_curve(noise_multiplier: float, sample_rate: float) -> Any:
    """Rényi divergences of one step, one per order of `_orders`: float64 array."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=_orders())
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian))
    return accountant.rdp


@lru_cache(maxsize=1)
def _orders() -> Any:
    import numpy as np

    # Integers alone: the sum for a fractional order is slow, and for some (q, sigma) does not converge.
    return np.concatenate([np.arange(2, 64), 2 ** np.arange(6, 11)])


def _grouped(events: Iterable[MechanismEvent]) -> _Grouped:
    return _grouped_pairs((event.noise_multiplier, event.sample_rate, event.steps) for event in events)


def _grouped_pairs(pairs: Iterable[tuple[float, float, int]]) -> _Grouped:
    steps_of: defaultdict[tuple[float, float], int] = defaultdict(int)
    for noise_multiplier, sample_rate, steps in pairs:
        # Checked here too: an event made without validation must not become a small epsilon.
        if not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
            raise _unsupported(f"a noise multiplier of {noise_multiplier:g}")
        if not 0 < sample_rate <= 1:
            raise _unsupported(f"a sample rate of {sample_rate:g}")
        if steps < 1:
            raise _unsupported(f"{steps} steps")
        steps_of[noise_multiplier, sample_rate] += steps
    return tuple(sorted((sigma, rate, steps) for (sigma, rate), steps in steps_of.items()))


def _checked_delta(delta: float) -> float:
    if not 0 < delta < 1:
        raise _unsupported(f"a delta of {delta:g}")
    return delta


def _unsupported(what: str) -> Refused:
    return Refused(
        Code.BUDGET,
        f"there is no epsilon for {what}.",
        "use a noise multiplier above 0, a sample rate in (0, 1], at least one step, and a delta in (0, 1).",
    )
