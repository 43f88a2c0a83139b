"""What the coordinator signs for a run: the plan once, and one task per round.

A site acts on nothing that its pinned coordinator key has not signed, and on no task that names another plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sspformer.contract.canonical import canonical_bytes, digest
from sspformer.contract.envelope import seal, verify
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import Digest, RunPlan

_Model = TypeVar("_Model", bound=BaseModel)
PLAN_KIND = "plan"
TASK_KIND = "round"

# Every number that a site may say about its round, and its range. Run time is not among them: with Poisson sampling it
# tells how many patients were drawn.
METRICS: dict[str, tuple[float, float]] = {
    "patients_bucket": (0, 1e6),
    "steps": (0, 1e6),
    "epsilon": (0, 1e3),
}


class RoundTask(BaseModel):
    """One request to a site: train on this head in this round, or keep this final head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan_digest: Digest
    run: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    round: int = Field(ge=1, le=1001, description="rounds count from 1; the final task carries plan.rounds + 1")
    head_digest: Digest = Field(description="digest_tensors of the decoded global difference that travels with it")
    kind: Literal["train", "final"]


def plan_digest(plan: RunPlan) -> str:
    """Digest of the plan's canonical bytes: what every task of the run names."""
    return digest(canonical_bytes(plan.model_dump(mode="json")))


def seal_plan(plan: RunPlan, key: Ed25519PrivateKey) -> bytes:
    """Sign a plan."""
    return seal(PLAN_KIND, plan.model_dump(mode="json"), key)


def open_plan(envelope: bytes, trusted: Iterable[Ed25519PublicKey]) -> RunPlan:
    """Verify and read a sealed plan.

    Raises:
        Refused: E-SIGNATURE or E-FORMAT.
    """
    return _read(RunPlan, verify(envelope, PLAN_KIND, trusted), "plan")


def seal_task(task: RoundTask, key: Ed25519PrivateKey) -> bytes:
    """Sign the task of one round."""
    return seal(TASK_KIND, task.model_dump(mode="json"), key)


def open_task(envelope: bytes, trusted: Iterable[Ed25519PublicKey], plan: RunPlan) -> RoundTask:
    """Verify and read a sealed task, and check that it belongs to the plan.

    Raises:
        Refused: E-SIGNATURE or E-FORMAT; E-PLAN, the task names another plan, another run or a round beyond the plan.
    """
    task = _read(RoundTask, verify(envelope, TASK_KIND, trusted), "round task")
    last = plan.rounds if task.kind == "train" else plan.rounds + 1
    if task.plan_digest != plan_digest(plan) or task.run != plan.run or task.round > last:
        raise Refused(Code.PLAN, f"A task does not belong to the plan of run {plan.run}.", "Tell the coordinator.")
    return task


def agreed_metrics(metrics: Mapping[str, object]) -> dict[str, float]:
    """Keep only named numbers within their range, rounded to four digits. The rest is dropped without a word."""
    kept: dict[str, float] = {}
    for name, (low, high) in METRICS.items():
        value = metrics.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high:
            kept[name] = round(float(value), 4)
    return kept


def _read(model: type[_Model], payload: dict[str, Any], noun: str) -> _Model:
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise Refused(
            Code.FORMAT, f"A signed {noun} has a wrong or unknown key: {key or 'payload'}.", "Use the same version."
        ) from None
