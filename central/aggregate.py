"""Turning the sites' updates into one step of the global head, by Flower's own strategies.

A strategy sees updates only (local head - global head), never heads: distances and medians of small differences keep
their digits. A site's word is never a weight: weights are equal, or the reported cohort sizes clamped to a factor of
two around their median. What is not finite, is longer than the plan allows or far longer than its peers is refused
before a strategy sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedTrimmedAvg, Krum

from sspformer.contract.errors import Code
from sspformer.contract.tensors import Delta

# An update this many times longer than the median one is not a neighbour's honest work on the same plan.
NORM_FACTOR = 10.0
# Updates shorter than this are all as good as zero: there is no telling apart by length among them.
NORM_FLOOR = 1e-3
# No head weight of a trained model moves this far in one round; it also keeps every sum below finite in fp32.
VALUE_BOUND = 100.0
# Server learning rate and floor of FedAdam, chosen for updates of about 1e-3 per weight (Reddi et al. 2021, section 4).
FEDADAM_ETA = 3e-3
FEDADAM_TAU = 1e-3
_WEIGHT = "weight"


@dataclass(frozen=True)
class Update:
    """What one site sent: its update and the public size class of its cohort."""

    site: str
    tensors: Delta
    patients_bucket: float = 1.0

    @property
    def norm(self) -> float:
        """Euclidean length over all tensors."""
        return norm(self.tensors)


@dataclass
class Aggregator:
    """One rule for a whole run. Only FedAdam keeps state between rounds; `state` and `restore` carry it."""

    rule: str
    weights: str = "equal"
    _moments: dict[str, Delta] = field(default_factory=dict)

    def step(self, round_number: int, updates: Sequence[Update]) -> Delta:
        """Aggregate checked updates into one step of the global head.

        The result depends on the updates alone: they are taken in the order of site names.

        Raises:
            ValueError: no update was given.
        """
        if not updates:
            raise ValueError("an aggregate needs at least one update")
        ordered = sorted(updates, key=lambda update: update.site)
        strategy = _strategy(self.rule, len(ordered))
        names = sorted(ordered[0].tensors)
        if isinstance(strategy, FedAdam):
            # FedAdam steps from where its sites started; in the coordinates of updates that is zero.
            strategy.current_arrays = {name: np.zeros_like(ordered[0].tensors[name]) for name in names}
            strategy.m_t, strategy.v_t = self._moments.get("m"), self._moments.get("v")
        weights = _weights([update.patients_bucket for update in ordered], self.weights)
        arrays, _ = strategy.aggregate_train(
            round_number, [_reply(update, weight) for update, weight in zip(ordered, weights, strict=True)]
        )
        if arrays is None:
            raise ValueError(f"rule {self.rule} gave no result for {len(ordered)} updates")
        if isinstance(strategy, FedAdam):
            self._moments = {"m": _fp32(strategy.m_t or {}), "v": _fp32(strategy.v_t or {})}
        return _fp32({name: arrays[name].numpy() for name in names})

    def state(self) -> Delta:
        """What the next round needs beside the head, by flat name; empty for every rule without memory."""
        return {
            f"{moment}/{name}": value for moment, tensors in self._moments.items() for name, value in tensors.items()
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        moments: dict[str, Delta] = {}
        for key, value in state.items():
            moment, _, name = key.partition("/")
            moments.setdefault(moment, {})[name] = value
        self._moments = moments


def norm(tensors: Mapping[str, np.ndarray]) -> float:
    """Euclidean length over all tensors, in double precision."""
    return float(np.sqrt(sum(float(np.square(tensors[name], dtype=np.float64).sum()) for name in sorted(tensors))))


def screen(updates: Sequence[Update], max_norm: float) -> tuple[list[Update], dict[str, str]]:
    """Separate updates that may be aggregated from those that may not.

    Args:
        updates: one of each site that answered.
        max_norm: longest update that the plan allows, however few sites answered.

    Returns:
        The updates that passed, and an error code for every site that did not.
    """
    passed: list[Update] = []
    refused: dict[str, str] = {}
    for update in updates:
        sane = all(
            np.isfinite(value).all() and np.abs(value).max(initial=0) <= VALUE_BOUND
            for value in update.tensors.values()
        )
        if sane and update.norm <= max_norm:
            passed.append(update)
        else:
            refused[update.site] = Code.TENSORS.value
    # With two updates nobody can say which of them is the strange one.
    if len(passed) >= 3:
        bound = NORM_FACTOR * _usual([update.norm for update in passed])
        refused |= {update.site: Code.TENSORS.value for update in passed if update.norm > bound}
        passed = [update for update in passed if update.site not in refused]
    return passed, refused


def _usual(norms: Sequence[float]) -> float:
    """Median length; of those that moved at all when most did not, so that an honest update is not called strange."""
    middle = median(norms) or median([norm for norm in norms if norm > 0] or [0.0])
    return max(middle, NORM_FLOOR)


def _strategy(rule: str, count: int) -> FedAvg:
    if rule == "fedavg":
        return FedAvg(weighted_by_key=_WEIGHT)
    if rule == "fedadam":
        return FedAdam(weighted_by_key=_WEIGHT, eta=FEDADAM_ETA, tau=FEDADAM_TAU)
    if rule == "fedmedian":
        return FedMedian(weighted_by_key=_WEIGHT)
    if rule == "fedtrimmedavg":
        # Flower cuts int(beta * count) values at each end: its default 0.2 would cut none of three or four.
        return FedTrimmedAvg(weighted_by_key=_WEIGHT, beta=min(0.49, max(0.2, (1 + 1e-9) / count)))
    if rule == "krum":
        # Krum tolerates f strangers among 2f + 3.
        return Krum(weighted_by_key=_WEIGHT, num_malicious_nodes=max(0, (count - 3) // 2))
    raise ValueError(f"unknown aggregation rule {rule}")


def _weights(buckets: Sequence[float], kind: str) -> list[float]:
    if kind == "equal":
        return [1.0] * len(buckets)
    sane = [bucket if np.isfinite(bucket) and bucket > 0 else 1.0 for bucket in buckets]
    middle = median(sane)
    return [min(2.0, max(0.5, bucket / middle)) for bucket in sane]


@dataclass(frozen=True)
class _Reply:
    """The part of a Flower reply that a strategy reads. A real one can only be made inside a running task."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


def _reply(update: Update, weight: float) -> Message:
    arrays = ArrayRecord({name: Array(np.asarray(update.tensors[name])) for name in sorted(update.tensors)})
    content = RecordDict({"update": arrays, "weights": MetricRecord({_WEIGHT: weight})})
    return cast(Message, _Reply(content))


def _fp32(tensors: Mapping[str, np.ndarray]) -> Delta:
    return {name: np.asarray(value, dtype=np.float32) for name, value in tensors.items()}
