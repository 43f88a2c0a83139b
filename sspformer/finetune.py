"""Fine-tuning a head on cached features, on one site, without any network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sspformer.contract.errors import Code, Refused
from sspformer.data.cohort import Cohort
from sspformer.model.assembly import Head, trainable_names
from sspformer.tasks.denoise import Denoise

WARM_UP_STEPS = 16
"""Adam starts without an idea of the gradients' scale and its first steps are mostly noise. In a federation it starts
anew in every round: without this many steps of warm-up a short round loses about 1 dB against training alone."""


def slice_batch(cohort: Cohort, picks: Sequence[tuple[str, int]], device: torch.device) -> tuple[Tensor, ...]:
    """Slices as a batch: features (B, N, D), base, target and inside (B, 1, H, W).

    Args:
        cohort: where slices are read from.
        picks: (subject, number of the slice among the subject's) per row.
        device: where the batch goes.
    """
    columns = zip(*(cohort.slice_at(subject, number) for subject, number in picks), strict=True)
    features, base, target, inside = (torch.stack(column).to(device) for column in columns)
    return features.float(), base.float(), target.float(), inside


def select_trainable(head: Head, part: str) -> list[torch.nn.Parameter]:
    """Let gradients reach a part of the head and no other; returns that part's parameters in the head's order."""
    names = set(trainable_names(head, part))
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for name, parameter in head.named_parameters() if name in names]


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
    schedule: tuple[float, float] = (0.0, 1.0),
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train a head in place with Adam; equal arguments give bitwise equal weights on one machine.

    Args:
        head: the head; only its `trainable` part changes.
        cohort: training patients.
        task: gives the loss.
        steps: optimizer steps.
        batch_slices: slices per step, each of a patient drawn at random.
        learning_rate: peak learning rate of Adam; it warms up over `WARM_UP_STEPS` and follows a cosine.
        schedule: which part of the cosine these steps are, from 0 (its peak) to 1 (its end): a round of a run is one
            part of the run's one cosine.
        trainable: see `trainable_names`.
        seed: decides which slices are drawn.
        on_step: called with (steps done, loss).

    Returns:
        Mean loss over the last quarter of the steps.

    Raises:
        Refused: E-TENSORS where the loss is not finite.
    """
    parameters = select_trainable(head, trainable)
    device = parameters[0].device
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
    rng = np.random.Generator(np.random.PCG64(seed))
    head.train()
    losses: list[float] = []
    begin, end = schedule
    for step in range(steps):
        warm_up = min(1.0, (step + 1) / min(WARM_UP_STEPS, steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm_up * 0.5 * (1 + np.cos(np.pi * (begin + (end - begin) * step / steps)))
        subjects = [cohort.train[i] for i in rng.integers(len(cohort.train), size=batch_slices)]
        picks = [(subject, int(rng.integers(cohort.slice_count(subject)))) for subject in subjects]
        features, base, target, inside = slice_batch(cohort, picks, device)
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(head(features, base), target, inside)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise Refused(Code.TENSORS, f"the loss is not finite at step {step + 1}.", "lower the learning rate.")
        on_step(step + 1, losses[-1])
    head.eval()
    return float(np.mean(losses[-max(1, steps // 4) :]))


def gradient_rms(head: Head, cohort: Cohort, task: Denoise, slices: int = 64, seed: int = 0) -> dict[str, float]:
    """Root mean square of the loss's gradient per tensor, over slices of a *public* cohort.

    Published with a head, it gives private training coordinates in which all tensors have gradients of like size: known
    before any patient is read, so it costs no privacy. Plain gradient steps are hopeless without it, because the last
    bias has gradients a hundred times those of other tensors.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    parameters = select_trainable(head, "head")
    device = parameters[0].device
    squares = [0.0] * len(parameters)
    for _ in range(slices):
        subject = cohort.train[int(rng.integers(len(cohort.train)))]
        number = int(rng.integers(cohort.slice_count(subject)))
        features, base, target, inside = slice_batch(cohort, [(subject, number)], device)
        loss = task.loss(head(features, base), target, inside)
        for i, gradient in enumerate(torch.autograd.grad(loss, parameters)):
            squares[i] += float(gradient.square().mean()) / slices
    names = [name for name, _ in head.named_parameters()]
    # A tensor without any gradient must not get an endless step.
    floor = 1e-3 * float(np.median([s**0.5 for s in squares]))
    return {name: max(square**0.5, floor) for name, square in zip(names, squares, strict=True)}
