"""The Flower client app: unpack, verify, call one function, pack.

It is only ever called by `site_client/worker.py`, in the site's own installation. What leaves is an update and agreed
numbers, or one fixed code; no text of an exception, no time, no path.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from site_client.logs import Event, event
from site_client.runs import Runs
from sspformer.contract.durable import make_private_folder, write_secret
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import RunPlan
from sspformer.contract.task import RoundTask, agreed_metrics, open_plan, open_task
from sspformer.contract.tensors import DTYPE, STYPE, Delta, Shapes, decode, digest_tensors, encode

_LOG = logging.getLogger("site_client")

# Flower wants every bundle to name a client app. This one answers nothing: only the worker can make one that does.
app = ClientApp()


class SiteLike(Protocol):
    """What a round needs to know of its site."""

    folder: Path
    coordinator_key: Ed25519PublicKey

    def head_shapes(self, plan: RunPlan) -> Shapes:
        """Names and shapes of all head tensors of the plan's published head."""


class ReplyLike(Protocol):
    """What a round function returns."""

    update: dict[str, np.ndarray]
    metrics: Mapping[str, float | int]


RoundFunction = Callable[[Any, RunPlan, int, Mapping[str, np.ndarray]], ReplyLike]
FinishFunction = Callable[[Any, RunPlan, Mapping[str, np.ndarray]], None]


@dataclass(frozen=True)
class Answer:
    """What leaves the site: an update with agreed numbers, or a code."""

    tensors: bytes = b""
    metrics: Mapping[str, float] = field(default_factory=dict)
    code: str | None = None


def client_app(site: SiteLike, round_function: RoundFunction, finish_function: FinishFunction) -> ClientApp:
    """Make the client app of an opened site."""
    opened = ClientApp()

    @opened.train()
    def train(message: Message, context: Context) -> Message:
        """Answer one message of the coordinator."""
        config = message.content.config_records.get("config", ConfigRecord())
        arrays = message.content.array_records.get("global", ArrayRecord())
        tensors = arrays["delta"].data if "delta" in arrays else b""
        said = answer(site, config.get("plan"), config.get("task"), tensors, round_function, finish_function)
        return _pack(said, message)

    return opened


def answer(
    site: SiteLike,
    plan_envelope: object,
    task_envelope: object,
    tensors: bytes,
    round_function: RoundFunction,
    finish_function: FinishFunction,
) -> Answer:
    """Verify what the coordinator signed, then train one round or keep the final head. Never raises.

    The same task again returns the bytes that were sent before: no second training, no second spending of privacy. A
    task that the run has left behind is refused, see `site_client.runs`.
    """
    try:
        if not isinstance(plan_envelope, bytes) or not isinstance(task_envelope, bytes):
            raise Refused(Code.FORMAT, "A message carries no sealed plan and task.", "Tell the coordinator.")
        plan = open_plan(plan_envelope, [site.coordinator_key])
        task = open_task(task_envelope, [site.coordinator_key], plan)
        delta = decode(tensors, site.head_shapes(plan))
        if digest_tensors(delta) != task.head_digest:
            raise Refused(Code.DIGEST, "The global head is not the one that the task names.", "Tell the coordinator.")
        runs = Runs(site.folder)
        kept = _kept(site.folder, task) if task.kind == "train" else None
        runs.check(task, kept is not None)
        if task.kind == "final":
            if not runs.is_delivered(task):  # an old final head must not replace a newer run's
                finish_function(site, plan, delta)
                runs.note(task)
            event(Event.FINISHED)
            return Answer()
        if kept is not None:
            event(Event.REPEATED, round=task.round)
            return kept
        said = _train(site, plan, task, delta, round_function)
        event(Event.TRAINED, round=task.round)
        return said
    except Refused as refusal:
        _LOG.warning("%s", refusal, exc_info=True)
        event(refusal.code)
        return Answer(code=refusal.code.value)
    except Exception:
        _LOG.exception("a round failed")
        event(Code.INTERNAL)
        return Answer(code=Code.INTERNAL.value)


def _train(site: SiteLike, plan: RunPlan, task: RoundTask, delta: Delta, round_function: RoundFunction) -> Answer:
    reply = round_function(site, plan, task.round, delta)
    unknown = set(reply.update) - set(delta)
    if unknown:
        raise Refused(Code.TENSORS, f"The round gave an update for unknown tensors: {sorted(unknown)}.", "Report this.")
    # Every update names every tensor of the head, so that its shape says nothing about what the plan trains.
    update = {name: reply.update.get(name, np.zeros_like(value)) for name, value in delta.items()}
    said = Answer(encode(update), agreed_metrics(dict(reply.metrics)))
    Runs(site.folder).note(task)
    _keep(site.folder, task, said)
    return said


def refusal_of(message: Message, code: Code) -> Message:
    """The reply that carries a code and nothing else."""
    return Message(RecordDict({"config": ConfigRecord({"code": code.value})}), reply_to=message)


def _pack(said: Answer, message: Message) -> Message:
    if said.code is not None:
        return refusal_of(message, Code(said.code))
    records: dict[str, Any] = {"metrics": MetricRecord(dict(said.metrics))}
    if said.tensors:
        records["update"] = ArrayRecord({"delta": Array(DTYPE, (len(said.tensors),), STYPE, said.tensors)})
    return Message(RecordDict(records), reply_to=message)


# -- the last reply of each round, on disk -----------------------------------------------------------------------------


def _keep(folder: Path, task: RoundTask, said: Answer) -> None:
    """Keep a reply before it is sent, so that a crash after this point repeats bytes and not a round."""
    path = _reply_path(folder, task)
    make_private_folder(path.parent)
    head = json.dumps({"task": task.model_dump(mode="json"), "metrics": dict(said.metrics)}, sort_keys=True)
    write_secret(path, head.encode() + b"\n" + said.tensors)
    for old in path.parent.glob(f"{task.run}-*.bin"):
        number = old.stem.removeprefix(f"{task.run}-")
        if number.isdigit() and int(number) < task.round:
            old.unlink()


def _kept(folder: Path, task: RoundTask) -> Answer | None:
    """The reply to exactly this task (plan, round and head digest), if it was made before."""
    try:
        head, _, tensors = _reply_path(folder, task).read_bytes().partition(b"\n")
        kept = json.loads(head)
    except (FileNotFoundError, ValueError):
        return None
    if kept.get("task") != task.model_dump(mode="json"):
        return None
    return Answer(tensors, kept["metrics"])


def _reply_path(folder: Path, task: RoundTask) -> Path:
    return folder / "replies" / f"{task.run}-{task.round}.bin"
