"""Scores on held-out patients: the input, non-local means, and any number of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sspformer.contract.errors import Code, Refused
from sspformer.data.cohort import Cohort
from sspformer.model.assembly import Head
from sspformer.tasks.denoise import Denoise, non_local_means, restore, scores

METRICS = ("psnr", "ssim", "psnr_whole", "ssim_whole")


@dataclass
class Evaluation:
    """Scores by method and metric, one number per held-out patient (in the cohort's order), and one slice to look at.

    `pictures` holds (H, W) float32 arrays by method, ``target`` among them, of the first patient's middle slice.
    """

    scores: dict[str, dict[str, list[float]]]
    pictures: dict[str, np.ndarray]

    def mean(self, method: str, metric: str) -> float:
        """Mean over patients."""
        return float(np.mean(self.scores[method][metric]))


def evaluate(cohort: Cohort, task: Denoise, heads: Mapping[str, Head], baselines: bool = True) -> Evaluation:
    """Score heads on the held-out patients.

    Args:
        cohort: its `test` patients are read, nobody else.
        task: the task whose degradation the cache holds.
        heads: heads by name.
        baselines: score the input and non-local means too.

    Raises:
        Refused: E-COHORT where no patient is held out.
    """
    if not cohort.test:
        raise Refused(Code.COHORT, "no held-out patient to evaluate on.", "add patients: at least two are needed.")
    result: dict[str, dict[str, list[float]]] = {}
    pictures: dict[str, np.ndarray] = {}
    for subject in cohort.test:
        examples = cohort.examples(subject)
        target, base, inside = (
            np.concatenate([getattr(e, name).numpy() for e in examples]) for name in ("target", "base", "inside")
        )
        target, base = target.astype(np.float32), base.astype(np.float32)
        outputs = {"input": base, "nlm": non_local_means(base, task.noise_sigma)} if baselines else {}
        for name, head in heads.items():
            outputs[name] = np.concatenate([restore(head, e.features, e.base.numpy()) for e in examples])
        for name, output in outputs.items():
            for metric, value in scores(output, target, inside).items():
                result.setdefault(name, {m: [] for m in METRICS})[metric].append(value)
        if not pictures:
            middle = len(target) // 2
            pictures = {"target": target[middle]} | {name: np.clip(o[middle], 0, 1) for name, o in outputs.items()}
    return Evaluation(result, pictures)


def named_paths(items: Sequence[str]) -> dict[str, Path]:
    """Each ``name=path`` as an entry of a mapping.

    Raises:
        Refused: E-CONFIG for anything else, and for names that are taken.
    """
    named: dict[str, Path] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not name or not path or name in named or name in ("input", "nlm", "warm", "target"):
            raise Refused(
                Code.CONFIG,
                f"--head {item!r} is not name=path with a free name.",
                "write --head mine=head.safetensors.",
            )
        named[name] = Path(path)
    return named
