"""One step of patient-level DP-SGD (Abadi et al. 2016, with the patient as the unit, add/remove adjacency).

The caller draws patients at the plan's public rate (`sampling.draw_patients`); this file turns them into one gradient:
clip each patient's whole gradient once, add them up, add noise, divide by the public expected number of patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from site_client.privacy.sampling import CryptoSource, check_distinct

T = TypeVar("T", bound=Hashable)

# Clip this much below C: the rounding of norms and products, even in float32 (1.2e-7), then never exceeds C.
_CLIP_MARGIN = 1e-6


@dataclass
class Tally:
    """What happened to the drawn patients. Depends on private data: for this site's eyes, never in a reply."""

    drawn: int = 0
    clipped: int = 0
    not_finite: int = 0


def private_gradient(
    parameters: Sequence[nn.Parameter],
    patients: Sequence[T],
    loss_of_patient: Callable[[T], Tensor],
    *,
    clipping_norm: float,
    noise_multiplier: float,
    expected_patients: float,
    source: CryptoSource,
    scale_P: Tensor | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """The noisy mean gradient of one step. An empty draw gives noise alone, and costs the same epsilon.

    A loop over patients with plain autograd: any layer works, memory holds one patient, and there is no per-sample
    gradient arithmetic to be wrong about. A patient whose gradient is not finite contributes zero, which is within the
    clipping norm like any other contribution.

    Args:
        parameters: what is trained, P numbers in all.
        patients: this step's Poisson draw, each patient at most once.
        loss_of_patient: one patient's mean loss over its slices, a scalar. Must look at no other patient.
        clipping_norm: C, the L2 bound on one patient's gradient over all parameters together.
        noise_multiplier: sigma; the noise has standard deviation sigma * C in every coordinate of the sum.
        expected_patients: the public divisor. Never the number drawn, which is private.
        source: where the noise comes from.
        scale_P: public positive constants that multiply every patient's gradient before it is clipped: coordinates in
            which all parameters have gradients of like size, so that no few of them use up C. None means ones.
        tally: counts to add to, kept at the site.

    Returns:
        gradient_P, float32, on the parameters' device and in the scaled coordinates; `assign_gradient` hands it to an
        optimizer (times `scale_P` once more, where one was given).

    Raises:
        Refused: E-DATA where a patient is drawn twice.
        ValueError: a constant that is not a positive finite number: a defect, plans and policies refuse it earlier.
    """
    for name, value in (
        ("clipping_norm", clipping_norm),
        ("noise_multiplier", noise_multiplier),
        ("expected_patients", expected_patients),
    ):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, not {value}")
    check_distinct(patients)
    tally = Tally() if tally is None else tally
    size = sum(parameter.numel() for parameter in parameters)
    device = parameters[0].device
    # float64: the sum's own rounding must stay far below what one patient may change, and the factor that tames a huge
    # gradient may be too small for float32.
    sum_P = torch.zeros(size, dtype=torch.float64, device=device)
    for patient in patients:
        tally.drawn += 1
        gradient_P = _gradient(parameters, loss_of_patient(patient))
        if gradient_P is None:
            continue
        if scale_P is not None:
            gradient_P.mul_(scale_P)
        factor = _clipping_factor(gradient_P, clipping_norm, tally)
        if factor > 0:  # zero times a gradient that is not finite would not be zero
            sum_P.add_(gradient_P, alpha=factor)
    noise_P = torch.from_numpy(source.normal(size)).to(device)
    sum_P.add_(noise_P, alpha=noise_multiplier * clipping_norm)
    return sum_P.div_(expected_patients).to(torch.float32)


def assign_gradient(parameters: Sequence[nn.Parameter], gradient_P: Tensor) -> None:
    """Puts a flat gradient where an optimizer looks for it: into every parameter's `grad`.

    Raises:
        ValueError: the lengths differ.
    """
    if gradient_P.numel() != sum(parameter.numel() for parameter in parameters):
        raise ValueError("the flat gradient and the parameters differ in length")
    start = 0
    for parameter in parameters:
        piece = gradient_P[start : start + parameter.numel()]
        parameter.grad = piece.view_as(parameter).to(parameter.dtype, copy=True)
        start += parameter.numel()


def _gradient(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor | None:
    """One patient's gradient over all parameters, flat and float32; None where the loss depends on none of them."""
    if not loss.requires_grad:
        return None
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(parameter, dtype=torch.float32).flatten()
            if gradient is None
            else gradient.float().flatten()
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
    )


def _clipping_factor(gradient_P: Tensor, clipping_norm: float, tally: Tally) -> float:
    """What to multiply a patient's gradient by, so that its norm is at most `clipping_norm`; 0 if it is not finite."""
    norm = float(torch.linalg.vector_norm(gradient_P, dtype=torch.float64))
    if not math.isfinite(norm):  # finite float32 numbers cannot overflow a float64 norm
        tally.not_finite += 1
        return 0.0
    bound = clipping_norm * (1 - _CLIP_MARGIN)
    if norm <= bound:
        return 1.0
    tally.clipped += 1
    return bound / norm
