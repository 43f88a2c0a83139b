"""What the demo reads back: the coordinator's records, and what each hospital measured on its held-out patients."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from central.demo.hospitals import Hospital
from central.demo.plans import PRIVATE
from central.federation import Federation
from central.registry import Publication
from central.report.summary import METHODS, DpSummary, HistoryPoint, Phase, SiteResult, Summary, warnings_for
from central.store import RoundRecord, RunStore, head_shapes
from sspformer.contract.errors import Code, Refused
from sspformer.contract.manifest import Manifest
from sspformer.contract.plan import RunPlan

LIBRARIES = ("sspformer-onsite", "flwr", "torch", "opacus", "numpy", "nibabel")


class Settings(Protocol):
    """What of the demo's settings is read here."""

    out: Path
    sites: Sequence[Path]

    @property
    def state(self) -> Path:
        """The coordinator's folder."""


def published(state: Path) -> Manifest:
    """What the coordinator published."""
    return Publication(Federation.open(state)).manifest()


def summarise(
    demo: Settings,
    hospitals: Sequence[Hospital],
    plans: tuple[RunPlan, RunPlan],
    started: float,
    phases: Sequence[Phase],
    left_out: Sequence[str] = (),
) -> Summary:
    """Put the numbers of a finished demo together.

    Args:
        demo: where things lie.
        hospitals: who took part.
        plans: without and with differential privacy.
        started: when the hospitals were started, seconds since the epoch.
        phases: how long each part took.
        left_out: a line about every hospital that could not take part.

    Raises:
        Refused: E-STATE, a run has no closed round; E-FORMAT, an evaluation is not one.
    """
    manifest = published(demo.state)
    blob = Publication(Federation.open(demo.state)).blob_path(manifest.head.digest)
    (plain, private), (records, records_dp) = plans, [_records(demo.state, plan) for plan in plans]
    summary = Summary(
        federation=manifest.federation,
        noise_sigma=plain.noise_sigma,
        data="given" if demo.sites else "warped",
        sites=[_site(hospital, demo.out, plans) for hospital in hospitals],
        rounds=len(records),
        rounds_dp=len(records_dp),
        aggregation=plain.aggregation,
        seconds_per_round=[record.seconds for record in records],
        seconds_per_round_dp=[record.seconds for record in records_dp],
        seconds_to_first_round=round(records[0].ended_at - started, 2),
        bytes_up_per_site_round=_mean([amount for record in records for amount in record.bytes_up.values()]),
        bytes_down_per_site_round=_mean([amount for record in records for amount in record.bytes_down.values()]),
        bytes_up_total=sum(sum(record.bytes_up.values()) for record in (*records, *records_dp)),
        encoder_bytes=manifest.encoder.bytes,
        head_bytes=manifest.head.bytes,
        trainable_parameters=sum(math.prod(shape) for shape in head_shapes(blob).values()),
        dp=_privacy(private, records_dp),
        phases=list(phases),
        digests={"encoder": manifest.encoder.digest, "warm head": manifest.head.digest},
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    )
    return summary.model_copy(update={"warnings": [*left_out, *warnings_for(summary)]})


def pictures(hospitals: Sequence[Hospital], out: Path) -> dict[str, dict[str, np.ndarray]]:
    """Example slices of every hospital, by method, (H, W) in [0, 1]."""
    found = {}
    for hospital in hospitals:
        with np.load(hospital.pictures(out), allow_pickle=False) as arrays:
            found[hospital.name] = {name: arrays[name] for name in arrays.files}
    return found


def _site(hospital: Hospital, out: Path, plans: tuple[RunPlan, RunPlan]) -> SiteResult:
    path = hospital.scores(out)
    try:
        scores = json.loads(path.read_text())
        numbers = {
            f"{metric}_{method}": scores["methods"][method][metric]
            for metric in ("psnr", "ssim", "psnr_whole", "ssim_whole")
            for method, _, _ in METHODS
        }
        return SiteResult(
            name=hospital.name,
            patients_train=scores["patients_train"],
            patients_test=scores["patients_test"],
            mri_bytes_stayed=hospital.mri_bytes,
            history=_history(hospital, plans[0]),
            history_dp=_history(hospital, plans[1]),
            **numbers,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            Code.FORMAT, f"{path}: {type(error).__name__}: {error}", "read the logs, then run the demo again."
        ) from None


def _history(hospital: Hospital, plan: RunPlan) -> list[HistoryPoint]:
    """A site's own curve. Of a round that was scored twice the first time counts; a torn line never does."""
    points: dict[int, float] = {}
    path = hospital.folder / "history" / f"{plan.run}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # a crash tore it; the round was asked, and scored, again
        points.setdefault(int(entry["round"]), float(entry["psnr"]))
    return [HistoryPoint(round=number, psnr=points[number]) for number in sorted(points)]


def _records(state: Path, plan: RunPlan) -> list[RoundRecord]:
    records = list(RunStore(state / "runs" / plan.run).records())
    if not records:
        raise Refused(Code.STATE, f"run {plan.run} closed no round.", f"read {state / 'logs'}")
    return records


def _privacy(plan: RunPlan, records: Sequence[RoundRecord]) -> DpSummary:
    """The privacy statement: the largest epsilon that any hospital reported, after the last round."""
    private = plan.private
    if private is None:
        raise Refused(Code.PLAN, f"the plan of run {PRIVATE} has no private part.", "restore it.")
    spent = [metrics["epsilon"] for record in records for metrics in record.metrics.values() if "epsilon" in metrics]
    if not spent:
        raise Refused(Code.STATE, f"no hospital reported an epsilon in run {plan.run}.", "read the hospitals' logs.")
    return DpSummary(
        epsilon=max(spent),
        delta=private.delta,
        noise_multiplier=private.noise_multiplier,
        clipping_norm=private.clipping_norm,
        sample_rate=private.sample_rate,
        steps=private.steps * plan.rounds,
    )


def _mean(amounts: Sequence[int]) -> int:
    return round(sum(amounts) / len(amounts)) if amounts else 0
