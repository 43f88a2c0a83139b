"""What this site remembers of each run, so that no signed task is good for more than one round.

The coordinator's signature says who asks, not that it asks for the first time. One small file per run name,
``runs/<run>.json``, holds the plan, the highest trained round with the head it started from, and the final head. With
it a run of R rounds sends at most R updates from here, an old final head does not come back, and one run name stands
for one plan.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sspformer.contract.canonical import canonical_bytes, parse
from sspformer.contract.durable import make_private_folder, write_secret
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import Digest
from sspformer.contract.task import RoundTask

_MAX_BYTES = 1 << 12


class RunRecord(BaseModel):
    """One run as this site took part in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Digest
    trained: int = Field(0, ge=0, description="highest round that was trained; 0 before the first")
    head: Digest | None = Field(None, description="the global head which that round started from")
    final: Digest | None = Field(None, description="the final head, once it was delivered")


class Runs:
    """The records of one site. Only the worker writes them, one task at a time.

    Args:
        root: the site's folder.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / "runs"

    def read(self, run: str) -> RunRecord | None:
        """The record of a run; None before its first trained round.

        Raises:
            Refused: E-STATE where it is damaged: taking it for a new run would train old rounds again.
        """
        path = self._path(run)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _damaged(path, error.strerror or "unreadable") from None
        try:
            return RunRecord.model_validate(parse(data, "the record of a run", max_bytes=_MAX_BYTES))
        except (Refused, ValidationError):
            raise _damaged(path, "damaged") from None

    def check(self, task: RoundTask, is_kept: bool = False) -> None:
        """Hold a verified task against what was done before.

        Args:
            task: the task.
            is_kept: whether a kept reply answers it, byte for byte: then no round is trained, whichever it is.

        Raises:
            Refused: E-PLAN for another plan under the run's name, a round below the highest trained one, another head
                in that round, any training after the final head, or another final head; E-STATE as `read`.
        """
        record = self.read(task.run)
        if record is None:
            return
        if task.plan_digest != record.plan:
            raise _refused(task, "has another plan here")
        if task.kind == "final":
            if record.final not in (None, task.head_digest):
                raise _refused(task, "has ended here with another head")
        elif record.final is not None:
            raise _refused(task, "has ended here")
        elif is_kept:
            return
        elif task.round < record.trained:
            raise _refused(task, f"is at round {record.trained} here, not at {task.round}")
        elif task.round == record.trained and task.head_digest != record.head:
            raise _refused(task, f"has trained round {task.round} here from another head")

    def is_delivered(self, task: RoundTask) -> bool:
        """Whether this very final head was delivered before."""
        record = self.read(task.run)
        return record is not None and record.final == task.head_digest

    def note(self, task: RoundTask) -> None:
        """Make a finished task durable, before anything of it is sent."""
        record = self.read(task.run) or RunRecord(plan=task.plan_digest)
        done = (
            {"trained": task.round, "head": task.head_digest} if task.kind == "train" else {"final": task.head_digest}
        )
        make_private_folder(self._folder)
        record = RunRecord.model_validate(record.model_dump() | done)
        write_secret(self._path(task.run), canonical_bytes(record.model_dump(mode="json")))

    def _path(self, run: str) -> Path:
        return self._folder / f"{run}.json"  # the plan's pattern for names leaves no way out of the folder


def _refused(task: RoundTask, why: str) -> Refused:
    return Refused(
        Code.PLAN,
        f"run {task.run} {why}; its {task.kind} task was refused.",
        "ask the coordinator to start a new run under another name.",
    )


def _damaged(path: Path, why: str) -> Refused:
    return Refused(Code.STATE, f"{path} cannot be used ({why}).", "restore it from the backup of the site's folder.")
