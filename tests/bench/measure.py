"""Interleaved repetitions: both sides meet the same machine in the same minutes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Ratio:
    """A ratio of two costs, one value per pair of repetitions.

    Args:
        name: what is compared, as "numerator / denominator".
        numerators: seconds of one side, by repetition.
        denominators: seconds of the other side, of the repetitions next to them.
        want: the bound.
        side: whether the ratio should be at least or at most that.
        note: what a reader must know to judge it.
    """

    name: str
    numerators: Sequence[float]
    denominators: Sequence[float]
    want: float
    side: Literal["at least", "at most"]
    note: str = ""

    @property
    def values(self) -> list[float]:
        """The ratio of each pair."""
        return [a / b for a, b in zip(self.numerators, self.denominators, strict=True)]

    @property
    def median(self) -> float:
        """Median over the pairs: one disturbed repetition does not decide."""
        return statistics.median(self.values)

    @property
    def holds(self) -> bool:
        """Whether the median is on the wanted side."""
        return self.median >= self.want if self.side == "at least" else self.median <= self.want

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "name": self.name,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "repetitions": len(self.values),
            "want": f"{self.side} {self.want:g}",
            "pass": self.holds,
            "seconds": {"numerator": list(self.numerators), "denominator": list(self.denominators)},
            "note": self.note,
        }


def interleave(
    one: Callable[[], object], other: Callable[[], object], repetitions: int, warm_up: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds of `one` and `other`, called in turn; the order within a pair alternates."""
    for _ in range(warm_up):
        one()
        other()
    seconds: tuple[list[float], list[float]] = ([], [])
    for repetition in range(repetitions):
        order = (0, 1) if repetition % 2 == 0 else (1, 0)
        for side in order:
            start = time.perf_counter()
            (one, other)[side]()
            seconds[side].append(time.perf_counter() - start)
    return seconds
