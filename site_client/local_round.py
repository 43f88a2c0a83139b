"""The story of one round at a hospital. Start reading here.

The order never changes: the plan is held against the site's policy, the budget is reserved and durable, then the head
is trained, clipped and noised, then the spending is settled, and only then does anything go back. A crash on the way
wastes budget; any other order could leak.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from site_client.history import append
from site_client.policy import Policy, check, check_update_norm
from site_client.privacy.events import Events, Reservation
from site_client.private_training import train_privately
from site_client.site import Site
from site_client.workspace import Workspace
from sspformer.checkpoint import save_module
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import RunPlan
from sspformer.contract.privacy import MechanismEvent
from sspformer.finetune import train
from sspformer.model.assembly import Head
from sspformer.tasks.denoise import restore, scores

_LOG = logging.getLogger("site_client")
HISTORY_PATIENTS = 6  # held-out patients scored in every round, for the site's own learning curve


@dataclass(frozen=True)
class RoundReply:
    """What may leave: the update (local head - global head) of the trained tensors, and agreed numbers."""

    update: dict[str, np.ndarray]
    metrics: dict[str, float | int]


def local_round(site: Site, plan: RunPlan, round_number: int, global_delta: Mapping[str, np.ndarray]) -> RoundReply:
    """Train one round on this site's patients.

    Args:
        site: the opened site.
        plan: the verified plan.
        round_number: 1 for the first round.
        global_delta: difference of the global head to the published one, by tensor.

    Raises:
        Refused: E-CONFIG, E-PLAN, E-BUDGET, E-COHORT, E-DATA or E-TENSORS; nothing has left then. Once a private round
            is charged, every failure is E-INTERNAL: which patients were drawn must not decide which code leaves.
    """
    policy = site.read_policy()  # once: the whole round is held against the same caps
    check(plan, policy, site.listed_patients(plan))
    reservation = reserve_budget(site, plan, round_number, policy)
    try:
        workspace = site.prepare(plan)
        check(plan, policy, len(workspace.cohort.train))  # broken scans may have left fewer than the listing
        head = workspace.head_at(global_delta)
        keep_history(site, workspace, plan, round_number, head)
    except BaseException:
        if reservation is not None:
            reservation.release()  # no patient was trained on
        raise
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    if reservation is None or plan.private is None:
        train_plainly(site, workspace, plan, round_number, head)
        update = difference(head, before)
        check_update_norm(norm(update), policy)
    else:
        reservation.start()  # durable before the first patient is drawn: from here on the round is paid for
        with one_code():
            train_privately(workspace, plan.private, head)
            update = difference(head, before)
            check_update_norm(norm(update), policy)
            reservation.spend()
    return RoundReply(update, agreed_numbers(site, plan, workspace))


@contextmanager
def one_code() -> Iterator[None]:
    """Turn every failure into the same refusal. What caused it is in the operator's log."""
    try:
        yield
    except Exception as error:
        raise Refused(
            Code.INTERNAL, "a private round failed after it was charged.", "read logs/operator.log."
        ) from error


def finish(site: Site, plan: RunPlan, global_delta: Mapping[str, np.ndarray]) -> None:
    """Keep the final head and score it for the site's own history.

    Raises:
        Refused: as `local_round`: a plan that may not train here may not leave its head here either.
    """
    check(plan, site.read_policy(), site.listed_patients(plan))
    workspace = site.prepare(plan)
    head = workspace.head_at(global_delta)
    keep_history(site, workspace, plan, plan.rounds + 1, head)
    folder = site.folder / "heads"
    for name in (f"{plan.run}.safetensors", "current.safetensors"):
        save_module(
            folder / name, head.cpu(), workspace.arch, "head", encoder_digest=workspace.encoder_digest, secret=True
        )


def reserve_budget(site: Site, plan: RunPlan, round_number: int, policy: Policy) -> Reservation | None:
    """Reserve this round's epsilon on disk; None for a plan without DP, which the site's policy had to allow."""
    if plan.private is None:
        return None
    events = Events(site.folder / "privacy")
    return events.reserve(plan.run, round_number, MechanismEvent.of(plan.private), policy)


def train_plainly(site: Site, workspace: Workspace, plan: RunPlan, round_number: int, head: Head) -> None:
    """Adam on slices drawn from a seed that plan, round and site decide: a repeated round gives the same bytes."""
    facts = f"{plan.seed}/{round_number}/{site.name}".encode()
    local = plan.local
    train(
        head,
        workspace.cohort,
        workspace.task,
        steps=local.steps,
        batch_slices=local.batch_slices,
        learning_rate=local.learning_rate,
        trainable=local.trainable,
        seed=int.from_bytes(hashlib.sha256(facts).digest()[:8], "big"),
        schedule=((round_number - 1) / plan.rounds, round_number / plan.rounds),
    )


def difference(head: Head, before: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Local head - global head, of the tensors that moved the plan's way."""
    return {
        name: (p.detach() - before[name]).cpu().numpy().astype(np.float32)
        for name, p in head.named_parameters()
        if p.requires_grad
    }


def norm(update: Mapping[str, np.ndarray]) -> float:
    """L2 norm over all tensors together; NaN where any value is."""
    return float(np.sqrt(sum(float(np.square(v, dtype=np.float64).sum()) for v in update.values())))


def agreed_numbers(site: Site, plan: RunPlan, workspace: Workspace) -> dict[str, float | int]:
    """Numbers that depend on nobody's image: the plan's steps; with DP epsilon, without it the cohort's size.

    The size, in powers of two, is an exact function of who is in the cohort: one patient more or less can show. A
    private round, whose promise covers exactly that, does not say it.
    """
    if plan.private is None:
        return {"patients_bucket": 1 << (len(workspace.cohort.train).bit_length() - 1), "steps": plan.local.steps}
    epsilon = Events(site.folder / "privacy").epsilon_spent(plan.private.delta, run=plan.run)
    return {"steps": plan.private.steps, "epsilon": epsilon}


def keep_history(site: Site, workspace: Workspace, plan: RunPlan, round_number: int, head: Head) -> None:
    """Score the incoming head on some held-out patients and note it in the site's own history. Never sent."""
    results = []
    for subject in workspace.cohort.test[:HISTORY_PATIENTS]:
        example = workspace.cohort.examples(subject)[0]
        output = restore(head, example.features, example.base.numpy())
        results.append(scores(output, example.target.float().numpy(), example.inside.numpy())["psnr"])
    if not results:
        return
    path = site.folder / "history" / f"{plan.run}.jsonl"
    append(path, {"round": round_number - 1, "psnr": float(np.mean(results))})
