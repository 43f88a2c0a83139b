"""Fine-tuning a head on cached features, on one site, without any network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sspformer.data.cohort import Cohort
from sspformer.model.assembly import Head, trainable_names
from sspformer.tasks.denoise import Denoise


def patient_batch(cohort: Cohort, picks: Sequence[tuple[str, int]], device: torch.device) -> tuple[Tensor, ...]:
    """Slices as a batch: features (B, N, D), base, target and inside (B, 1, H, W).

    Args:
        cohort: where slices are read from.
        picks: (subject, random number) per slice; the number chooses the slice among those of the subject.
        device: where the batch goes.
    """
    rows = []
    for subject, number in picks:
        entries = cohort.entries[subject]
        example = cohort.cache.load(entries[number % len(entries)])
        row = (number // len(entries)) % len(example.base)
        rows.append((example.features[row], example.base[row][None], example.target[row][None], example.inside[row][None]))
    features, base, target, inside = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
    return features.float(), base.float(), target.float(), inside


def train(
    head: Head,
    cohort: Cohort,
    task: Denoise,
    *,
    steps: int,
    batch_slices: int,
    learning_rate: float,
    trainable: str,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train a head in place with Adam; equal arguments give bitwise equal weights on one machine.

    Args:
        head: the head; only its `trainable` part changes.
        cohort: training patients.
        task: gives the loss.
        steps: optimizer steps; the learning rate warms up over the first tenth and decays by a cosine.
        batch_slices: slices per step, each of a patient drawn at random.
        learning_rate: peak learning rate of Adam.
        trainable: see `trainable_names`.
        seed: decides which slices are drawn.
        on_step: called with (steps done, loss).

    Returns:
        Mean loss over the last quarter of the steps.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    names = set(trainable_names(head, trainable))
    parameters = []
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            parameters.append(parameter)
    device = parameters[0].device
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
    rng = np.random.Generator(np.random.PCG64(seed))
    head.train()
    losses: list[float] = []
    for step in range(steps):
        warm_up = min(1.0, (step + 1) / max(1, steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm_up * 0.5 * (1 + np.cos(np.pi * step / steps))
        picks = [(cohort.train[rng.integers(len(cohort.train))], int(rng.integers(2**31))) for _ in range(batch_slices)]
        features, base, target, inside = patient_batch(cohort, picks, device)
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(head(features, base), target, inside)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is not finite at step {step}")
        on_step(step + 1, losses[-1])
    head.eval()
    return float(np.mean(losses[-max(1, steps // 4) :]))
