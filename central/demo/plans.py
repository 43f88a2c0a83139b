"""The two plans of the demo: without and with differential privacy. Every constant in them is public."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sspformer.contract.durable import write_file
from sspformer.contract.plan import RunPlan

PLAIN, PRIVATE = "plain", "private"
FULL_SIZE = 128  # the public cohort size that private.yaml was made for


def public_size(patients: int) -> int:
    """The cohort size that a plan may know: rounded down to a power of two, so that one patient changes nothing."""
    return 1 << (max(2, patients).bit_length() - 1)


def load_plan(
    name: str,
    published: Mapping[str, str],
    sites: int,
    smallest: int,
    rounds: int | None = None,
    contrast: str = "T1w",
) -> RunPlan:
    """Fill in one of the packaged plans.

    Args:
        name: `plain` or `private`.
        published: digests of the published `encoder` and `head`.
        sites: how many hospitals take part.
        smallest: training patients of the smallest hospital.
        rounds: instead of the plan's own number, for a quick look.
        contrast: BIDS suffix of the scans to train on.
    """
    settings: dict[str, Any] = yaml.safe_load((files("central.demo") / f"{name}.yaml").read_text())
    settings |= dict(published)
    settings["contrasts"] = [contrast]
    settings["rounds"] = rounds or settings["rounds"]
    settings["quorum"] = min(settings["quorum"], sites)  # the demo shows every hospital, so it waits for all
    if name == PRIVATE:
        private = settings["private"]
        size = public_size(smallest)
        private["expected_patients"] = private["sample_rate"] * size
        # The noise of a step grows as the cohort shrinks; the step shrinks with it, so that noise never moves a head
        # further than it does in the cohort that the plan was made for.
        private["learning_rate"] *= min(1.0, size / FULL_SIZE)
    return RunPlan.model_validate(settings)


def write_plan(plan: RunPlan, path: Path) -> None:
    """Write a plan the way an operator would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False).encode())
