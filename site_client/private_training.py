"""The private half of a round: DP-SGD steps on this site's patients."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch

from site_client.privacy.mechanism import Tally, assign_gradient, private_gradient
from site_client.privacy.sampling import CryptoSource, choose_slices, draw_patients
from site_client.workspace import Workspace
from sspformer.contract.plan import PrivateTraining
from sspformer.finetune import select_trainable, slice_batch
from sspformer.model.assembly import Head

_LOG = logging.getLogger("site_client")


def train_privately(workspace: Workspace, private: PrivateTraining, head: Head) -> None:
    """DP-SGD with the patient as the unit; randomness from the operating system, every constant from the plan.

    The step is in units of the clipping norm, so that a learning rate says how far patients who agree move the head,
    whatever C is. Gradients are clipped and noised in coordinates that the published head gives (`public_scale`).
    Everything after the noisy gradient is post-processing.
    """
    source, tally = CryptoSource(), Tally()
    parameters = select_trainable(head, private.trainable)
    scale_P = public_scale(workspace.gradient_rms, head)
    head.train()
    for _ in range(private.steps):
        gradient = private_gradient(
            parameters,
            draw_patients(workspace.cohort.train, private.sample_rate, source),
            lambda subject: patient_loss(workspace, head, subject, private.slices_per_patient, source),
            clipping_norm=private.clipping_norm,
            noise_multiplier=private.noise_multiplier,
            expected_patients=private.expected_patients,
            source=source,
            scale_P=scale_P,
            tally=tally,
        )
        assign_gradient(parameters, gradient * scale_P)
        with torch.no_grad():
            for parameter in parameters:
                parameter -= private.learning_rate / private.clipping_norm * parameter.grad
                parameter.grad = None
    head.eval()
    _LOG.info("private round: %d draws, %d clipped, %d not finite", tally.drawn, tally.clipped, tally.not_finite)


def patient_loss(workspace: Workspace, head: Head, subject: str, at_most: int, source: CryptoSource) -> torch.Tensor:
    """Mean loss over up to `at_most` slices of one patient, drawn at random."""
    numbers = choose_slices(workspace.cohort.slice_count(subject), at_most, source)
    features, base, target, inside = slice_batch(workspace.cohort, [(subject, n) for n in numbers], workspace.device)
    return workspace.task.loss(head(features, base), target, inside)


def public_scale(gradient_rms: Mapping[str, float], head: Head) -> torch.Tensor:
    """Constants that bring the gradients of all trained tensors to like size, one per trained number: scale_P.

    They come from public data and the head's shapes alone; their geometric mean is 1. A head whose file says nothing
    about its gradients gets ones.
    """
    trained = [(name, p) for name, p in head.named_parameters() if p.requires_grad]
    total = sum(p.numel() for _, p in trained)
    logs = {name: math.log(gradient_rms.get(name, 1.0)) for name, _ in trained}
    middle = sum(p.numel() * logs[name] for name, p in trained) / total
    return torch.cat([torch.full((p.numel(),), math.exp(middle - logs[name]), device=p.device) for name, p in trained])
