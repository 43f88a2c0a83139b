"""Privacy events on disk: what may be charged, durable before the data is read, so that no crash forgets an epsilon.

A reservation goes RESERVED -> STARTED -> SPENT, or RESERVED -> RELEASED if it never started. STARTED is on disk before
the first batch is read; from then on it counts in full, whatever happens to the process. Each line of ``events.jsonl``
holds the hash of the line before it, and ``head.json`` the last one: an edit, a lost line, a swap or an older copy of
either file alone is noticed. Whoever may write both files can rewrite both: this is evidence against accident and
carelessness only, and deleting the whole folder is not noticed at all.

A crash may tear the line being written. Such a tail (no line end, and beyond what head.json vouches for) was never
durable: its writer had not returned, so nobody acted on it. It is ignored on reading and cut off, with a TORN line that
keeps its length and hash, by the next writer. Any other damage is refused with E-STATE and left as it is.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from site_client.policy import Policy
from site_client.privacy import accounting
from sspformer.contract.canonical import canonical_bytes, digest, parse
from sspformer.contract.durable import SECRET_MODE, make_private_folder, sync_folder, write_secret
from sspformer.contract.errors import Code, Refused
from sspformer.contract.privacy import MechanismEvent

_GENESIS = "sha256:" + "0" * 64
_MAX_LINE_BYTES = 1 << 16
_LOCK_WAIT_S = 10.0


class Kind(StrEnum):
    """What a line says."""

    RESERVED = "RESERVED"
    STARTED = "STARTED"
    SPENT = "SPENT"
    RELEASED = "RELEASED"
    TORN = "TORN"


# What may follow what, for one reservation. None: nothing was written about it yet.
_NEXT: dict[Kind | None, frozenset[Kind]] = {
    None: frozenset({Kind.RESERVED}),
    Kind.RESERVED: frozenset({Kind.STARTED, Kind.RELEASED}),
    Kind.STARTED: frozenset({Kind.SPENT}),
    Kind.SPENT: frozenset(),
    Kind.RELEASED: frozenset(),
}


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    seq: int
    at: str
    kind: Kind
    reservation: str
    run: str | None = None
    round: int | None = None
    mechanism: MechanismEvent | None = None
    note: str | None = None
    previous: str
    hash: str

    def expected_hash(self) -> str:
        return digest(canonical_bytes(self.model_dump(mode="json", exclude={"hash"})))


@dataclass
class _Log:
    """The file as read under the lock."""

    lines: list[_Line] = field(default_factory=list)
    durable_bytes: int = 0
    torn: bytes = b""

    @property
    def head(self) -> str:
        return self.lines[-1].hash if self.lines else _GENESIS

    def state(self) -> dict[str, Kind]:
        return {line.reservation: line.kind for line in self.lines if line.kind is not Kind.TORN}

    def mechanisms(self, *kinds: Kind, run: str | None = None) -> list[MechanismEvent]:
        state = self.state()
        return [
            line.mechanism
            for line in self.lines
            if line.mechanism is not None and state.get(line.reservation) in kinds and run in (None, line.run)
        ]


@dataclass(frozen=True)
class Reservation:
    """A claim on the budget for one round. Made by `Events.reserve`."""

    events: Events
    id: str
    run: str
    round: int
    mechanism: MechanismEvent

    def start(self) -> None:
        """Makes the charge durable. Call before the first batch is read; when it returns, the round counts in full.

        Raises:
            Refused: E-STATE when the reservation was released or already started.
        """
        self.events._append(Kind.STARTED, self.id)

    def spend(self) -> None:
        """Closes the charge: the noisy result exists. Changes no epsilon, that was charged at `start`.

        Raises:
            Refused: E-STATE when it was not started, or is closed.
        """
        self.events._append(Kind.SPENT, self.id)

    def release(self) -> None:
        """Gives the claim back. Only a reservation that never started can be.

        Raises:
            Refused: E-STATE when it was started.
        """
        self.events._append(Kind.RELEASED, self.id)


class Events:
    """The privacy events of one site. Safe to use from several processes: every call locks, reads and verifies anew.

    Args:
        folder: the site's ``privacy`` folder, on a local disk; made (0700) when it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "events.jsonl"
        self._head_path = folder / "head.json"

    def reserve(self, run: str, round: int, mechanism: MechanismEvent, caps: Policy) -> Reservation:
        """Claims budget for one round, durably, before any patient is read.

        What is charged, what is reserved and what is asked are composed together and held against `caps.max_epsilon`.
        A reservation of the same run and round that never started (its process died) is released first.

        Raises:
            Refused: E-BUDGET when the site's budget does not cover it; E-STATE when the events are damaged or locked.
        """
        with self._locked() as log:
            stale = [
                line.reservation
                for line in log.lines
                if line.kind is Kind.RESERVED and (line.run, line.round) == (run, round)
            ]
            self._release_never_started(log, stale)
            before = log.mechanisms(Kind.RESERVED, Kind.STARTED, Kind.SPENT)
            if caps.max_epsilon is not None and not accounting.within(
                [*before, mechanism], caps.delta, caps.max_epsilon
            ):
                raise Refused(
                    Code.BUDGET,
                    f"round {round} of run {run} would bring this site beyond policy.max_epsilon {caps.max_epsilon:g} "
                    f"per patient at delta {caps.delta:g}; it has spent {accounting.epsilon(before, caps.delta):.3f}.",
                    "take part without private rounds, or let the hospital's privacy officer decide on the budget.",
                )
            reservation = Reservation(self, secrets.token_hex(8), run, round, mechanism)
            self._write(log, Kind.RESERVED, reservation.id, run=run, round=round, mechanism=mechanism)
        return reservation

    def charged(self, run: str | None = None) -> list[MechanismEvent]:
        """Everything that counts: started or spent, in the order it was reserved; of one run where it is named.

        Raises:
            Refused: E-STATE.
        """
        with self._locked() as log:
            return log.mechanisms(Kind.STARTED, Kind.SPENT, run=run)

    def outstanding(self) -> list[MechanismEvent]:
        """Reserved and not started yet: held against the budget, not charged.

        Raises:
            Refused: E-STATE.
        """
        with self._locked() as log:
            return log.mechanisms(Kind.RESERVED)

    def epsilon_spent(self, delta: float, run: str | None = None) -> float:
        """Epsilon per patient of everything charged, at `delta`.

        Args:
            delta: the delta of the (epsilon, delta) statement.
            run: count this run alone. What a coordinator may be told: the site's total is the site's own business.

        Raises:
            Refused: E-STATE.
        """
        return accounting.epsilon(self.charged(run), delta)

    def release_never_started(self) -> int:
        """Releases what a dead process reserved and never started. For the site's start-up; returns how many.

        Should their process live after all, its `start` is refused: nothing goes uncounted.

        Raises:
            Refused: E-STATE.
        """
        with self._locked() as log:
            return self._release_never_started(log, list(log.state()))

    def _release_never_started(self, log: _Log, reservations: list[str]) -> int:
        state = log.state()
        stale = [name for name in reservations if state[name] is Kind.RESERVED]
        for name in stale:
            self._write(log, Kind.RELEASED, name)
        return len(stale)

    def _append(self, kind: Kind, reservation: str) -> None:
        with self._locked() as log:
            self._write(log, kind, reservation)

    @contextmanager
    def _locked(self) -> Iterator[_Log]:
        try:
            make_private_folder(self._folder)
            lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, SECRET_MODE)
        except OSError as error:
            raise self._unusable(f"cannot be opened ({error.strerror})") from None
        try:
            self._wait_for(lock)
            yield self._read()
        except OSError as error:
            raise self._unusable(f"cannot be read or written ({error.strerror})") from None
        finally:
            os.close(lock)  # which unlocks, as does the death of this process

    def _wait_for(self, lock: int) -> None:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._unusable(f"is held by another process for more than {_LOCK_WAIT_S:g} s") from None
                time.sleep(0.01)

    def _read(self) -> _Log:
        log = _Log()
        content = self._path.read_bytes() if self._path.exists() else b""
        log.durable_bytes = content.rfind(b"\n") + 1
        log.torn = content[log.durable_bytes :]
        state: dict[str, Kind | None] = {}
        for number, raw in enumerate(content[: log.durable_bytes].split(b"\n")[:-1], start=1):
            line = self._parse(raw, number)
            if line.seq != number or line.previous != log.head or line.hash != line.expected_hash():
                raise self._damaged(f"line {number} does not follow from the line before it")
            if line.kind is not Kind.TORN:
                self._check_step(state.get(line.reservation), line, number)
                state[line.reservation] = line.kind
            log.lines.append(line)
        self._check_head(log)
        return log

    def _parse(self, raw: bytes, number: int) -> _Line:
        try:
            line = _Line.model_validate(parse(raw, f"line {number}", max_bytes=_MAX_LINE_BYTES))
        except (Refused, ValidationError):
            raise self._damaged(f"line {number} is not a privacy event") from None
        if canonical_bytes(line.model_dump(mode="json")) != raw:
            raise self._damaged(f"line {number} is not written as this software writes it")
        return line

    def _check_step(self, before: Kind | None, line: _Line, number: int) -> None:
        if line.kind not in _NEXT[before] or (line.kind is Kind.RESERVED) != (line.mechanism is not None):
            raise self._damaged(f"line {number} says {line.kind} where that cannot be")

    def _check_head(self, log: _Log) -> None:
        """The file must reach at least as far as head.json vouches for. It may be one crash further."""
        if not self._head_path.exists():
            # Written right after the first line: without it there is at most that one.
            if len(log.lines) > 1:
                raise self._damaged("head.json is missing")
            return
        try:
            head: Any = parse(self._head_path.read_bytes(), "head.json", max_bytes=_MAX_LINE_BYTES)
            seq, expected = int(head["seq"]), str(head["hash"])
        except (Refused, KeyError, TypeError, ValueError):
            raise self._damaged("head.json is not what this software writes") from None
        if not 1 <= seq <= len(log.lines) or log.lines[seq - 1].hash != expected:
            raise self._damaged(f"events.jsonl does not hold line {seq}, which head.json vouches for")

    def _write(
        self,
        log: _Log,
        kind: Kind,
        reservation: str,
        *,
        run: str | None = None,
        round: int | None = None,
        mechanism: MechanismEvent | None = None,
    ) -> None:
        state = log.state().get(reservation)
        if kind not in _NEXT[state]:
            raise Refused(
                Code.STATE,
                f"privacy reservation {reservation} is {state}, so it cannot become {kind}.",
                "reserve anew: every computation on patients needs its own reservation.",
            )
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, SECRET_MODE)
        try:
            if log.torn:
                os.ftruncate(descriptor, log.durable_bytes)
                note = f"{len(log.torn)} bytes, {digest(log.torn)}"
                log.torn = b""
                self._put(descriptor, log, kind=Kind.TORN, reservation="", note=note)
            self._put(descriptor, log, kind=kind, reservation=reservation, run=run, round=round, mechanism=mechanism)
        finally:
            os.close(descriptor)

    def _put(self, descriptor: int, log: _Log, **body: Any) -> None:
        unsealed = _Line(
            seq=len(log.lines) + 1,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            previous=log.head,
            hash="",
            **body,
        )
        line = unsealed.model_copy(update={"hash": unsealed.expected_hash()})
        rest = memoryview(canonical_bytes(line.model_dump(mode="json")) + b"\n")
        offset = log.durable_bytes
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            offset, rest = offset + written, rest[written:]
        os.fsync(descriptor)
        if not log.lines:
            sync_folder(self._folder)
        log.durable_bytes = offset
        log.lines.append(line)
        write_secret(self._head_path, canonical_bytes({"seq": line.seq, "hash": line.hash}))

    def _damaged(self, what: str) -> Refused:
        return Refused(
            Code.STATE,
            f"the privacy events in {self._folder} are damaged: {what}.",
            "restore the folder from a backup that is not older, and do not train until then.",
        )

    def _unusable(self, what: str) -> Refused:
        return Refused(
            Code.STATE,
            f"{self._path} {what}.",
            "see that no second site runs in this folder, and that its user may write there and the disk has room.",
        )
