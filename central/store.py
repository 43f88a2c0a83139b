"""A run's folder: what makes a run resumable, and what people and reports read.

    plan.json                  the sealed plan
    round-0001.safetensors     global head after round 1, as fp32 difference to the published head; metadata: its record
    round-0001.state           what the aggregation rule remembers, safetensors; only for a rule with memory
    rounds.jsonl               one record per closed round, in order
    status.json                where the run stands now
    lock                       held by the one process that runs the rounds

The checkpoint is the truth. Everything else is written before it (state) or can be written again from it (records).
"""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from central.federation import Federation
from sspformer.contract.artifact import read_header
from sspformer.contract.durable import write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import RunPlan
from sspformer.contract.task import open_plan
from sspformer.contract.tensors import Delta, Shapes, digest_tensors

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_CHECKPOINT = re.compile(r"round-(\d{4})\.safetensors")


@dataclass(frozen=True)
class RoundRecord:
    """One closed round, as reports read it. Bytes count what Flower carried: tensors and signed texts."""

    round: int
    sites: tuple[str, ...]
    missing: dict[str, str]
    seconds: float
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    update_norm: float
    head: str
    ended_at: float
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)


@dataclass(frozen=True)
class Checkpoint:
    """The global head after a round, and what the aggregation rule remembers."""

    round: int
    delta: Delta
    state: Delta


class RunStore:
    """One run's folder.

    Args:
        folder: STATE/runs/<run>; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, plan: bytes) -> RunStore:
        """Make the folder of a new run around its sealed plan.

        Raises:
            Refused: E-STATE, a run of that name exists.
        """
        if (folder / "plan.json").exists():
            raise Refused(
                Code.STATE,
                f"Run {folder.name} exists already.",
                f"Choose another name under 'run:', or continue it: central run STATE --resume {folder.name}",
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "plan.json", plan)
        return cls(folder)

    @property
    def plan(self) -> bytes:
        """The sealed plan.

        Raises:
            Refused: E-STATE, there is no such run.
        """
        try:
            return (self.folder / "plan.json").read_bytes()
        except OSError:
            raise Refused(
                Code.STATE,
                f"There is no run {self.folder.name} in {self.folder.parent}.",
                "List runs: central status STATE",
            ) from None

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def commit(self, record: RoundRecord, delta: Delta, state: Delta) -> None:
        """Make a round durable: rule state first, then the head with its record, then the log line."""
        if state:
            write_file(self._state(record.round), _safetensors(state))
        write_file(self.checkpoint(record.round), _safetensors(delta, {"record": record.line()}))
        self._append(record)

    def latest(self, shapes: Shapes, stateful: bool = False) -> Checkpoint | None:
        """Read the newest checkpoint back, and write again any log line that a crash swallowed.

        Raises:
            Refused: E-STATE, the checkpoint is damaged or is not of this head.
        """
        numbers = self._numbers()
        if not numbers:
            return None
        number = numbers[-1]
        delta = self.head(number, shapes)
        state = self._load(self._state(number)) if stateful else {}
        logged = {record.round for record in self.records()}
        for missing in (n for n in numbers if n not in logged):
            self._append(self._recorded(missing))
        return Checkpoint(number, delta, state)

    def head(self, number: int, shapes: Shapes) -> Delta:
        """The global difference after a round, checked against the published head and the record's digest.

        Raises:
            Refused: E-STATE.
        """
        path = self.checkpoint(number)
        delta = self._load(path)
        if {name: value.shape for name, value in delta.items()} != dict(shapes):
            raise self._damaged(path, "does not have the tensors of the published head")
        if digest_tensors(delta) != self._recorded(number).head:
            raise self._damaged(path, "does not match its digest")
        return delta

    def checkpoint(self, number: int) -> Path:
        """Where the head after a round lies."""
        return self.folder / f"round-{number:04d}.safetensors"

    def last_round(self) -> int:
        """Number of the newest checkpoint, 0 before the first round closed."""
        return max(self._numbers(), default=0)

    # -- what people read --------------------------------------------------------------------------------------------

    def records(self) -> Iterator[RoundRecord]:
        """Closed rounds in order. A line cut short by a crash is passed over: its checkpoint brings it back."""
        path = self.folder / "rounds.jsonl"
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            record = _read_record(line)
            if record is not None:
                yield record

    def set_status(self, state: str, **details: Any) -> None:
        """Say where the run stands: `waiting`, `running`, `delivering`, `finished`, `failed` or `lost`."""
        text = json.dumps({"state": state, "at": time.time(), **details}, sort_keys=True, allow_nan=False)
        write_file(self.folder / "status.json", text.encode())

    def status(self) -> dict[str, Any]:
        """What `set_status` said last; state `new` before anything was said."""
        try:
            status: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        except FileNotFoundError:
            return {"state": "new"}
        return status

    # -- one process at a time ---------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the run. The kernel lets go when the process dies, however it dies.

        Args:
            wait_s: how long to wait for another holder; `is_held` is one for an instant.

        Raises:
            Refused: E-STATE, another process runs these rounds.
        """
        deadline = time.monotonic() + wait_s
        with (self.folder / "lock").open("a") as handle:
            while not _try_lock(handle):
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                raise Refused(
                    Code.STATE, f"Run {self.folder.name} is already running.", "Watch it: central status STATE"
                )
            yield

    def is_held(self) -> bool:
        """Whether a living process runs these rounds."""
        try:
            with self.locked():
                return False
        except Refused:
            return True

    # -- inside ------------------------------------------------------------------------------------------------------

    def _numbers(self) -> list[int]:
        found = (_CHECKPOINT.fullmatch(path.name) for path in self.folder.glob("round-*.safetensors"))
        return sorted(int(match.group(1)) for match in found if match)

    def _state(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.state"

    def _load(self, path: Path) -> Delta:
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            raise self._damaged(path, "cannot be read") from None

    def _recorded(self, number: int) -> RoundRecord:
        path = self.checkpoint(number)
        try:
            with safe_open(path, framework="np") as file:
                record = _read_record((file.metadata() or {}).get("record", ""))
        except (OSError, SafetensorError):
            record = None
        if record is None or record.round != number:
            raise self._damaged(path, "carries no record of its round")
        return record

    def _append(self, record: RoundRecord) -> None:
        # Rewritten whole: a torn line never stays, and a run has at most a thousand short ones.
        kept = {known.round: known for known in self.records()} | {record.round: record}
        write_file(self.folder / "rounds.jsonl", "".join(kept[n].line() + "\n" for n in sorted(kept)).encode())

    def _damaged(self, path: Path, reason: str) -> Refused:
        return Refused(
            Code.STATE,
            f"{path} {reason}.",
            f"Remove {path.name} (and a .state file of that round): the run resumes from the round before.",
        )


def runs_folder(federation: Federation) -> Path:
    """Folder of all runs."""
    return federation.root / "runs"


def open_run(federation: Federation, name: str) -> tuple[RunStore, RunPlan]:
    """Open an existing run by its name, and check that the plan in its folder is this run's.

    Raises:
        Refused: E-CONFIG, the name is none (a path, say); E-STATE, there is no such run; E-SIGNATURE or E-FORMAT, its
            plan is not ours; E-PLAN, it is the plan of another run.
    """
    if not RUN_NAME.fullmatch(name):  # before it becomes a part of a path
        raise Refused(
            Code.CONFIG, "The name of a run has lower-case letters, digits and dashes only.", "central status STATE"
        )
    store = RunStore(runs_folder(federation) / name)
    plan = open_plan(store.plan, [federation.signing_key().public_key()])
    if plan.run != name:
        raise Refused(
            Code.PLAN,
            f"{store.folder} holds the plan of run {plan.run}.",
            "Restore that folder from the backup of the coordinator's folder.",
        )
    return store, plan


def head_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published head, from its header alone.

    Raises:
        Refused: E-FORMAT or E-STATE.
    """
    return {name: spec.shape for name, spec in read_header(path).tensors.items()}


def write_head(published: Path, delta: Mapping[str, np.ndarray], target: Path) -> str:
    """Write the published head plus a difference as a safetensors file of its own.

    Tensors keep the published dtype and the metadata of the published file.

    Returns:
        `sha256:` digest of the written head's tensors.
    """
    metadata = read_header(published).metadata
    base = load_file(published)
    head = {name: (value.astype(np.float32) + delta[name]).astype(value.dtype) for name, value in base.items()}
    write_file(target, _safetensors(head, metadata))
    return digest_tensors(head)


def _safetensors(tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    # The format's writer reads memory as it lies: scalars and strided views have to become plain arrays first.
    return save({name: np.asarray(value, order="C") for name, value in tensors.items()}, metadata=metadata or None)


def _try_lock(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_record(line: str) -> RoundRecord | None:
    try:
        fields = json.loads(line)
        return RoundRecord(**(fields | {"sites": tuple(fields["sites"])}))
    except (ValueError, TypeError, KeyError):
        return None
