"""The rounds of a run. Start reading here.

`run_rounds` reads top to bottom like the story of a run: resume where the last checkpoint ends; in every round sign a
task, ask every site, wait for quorum or deadline, refuse what cannot be right, take one aggregation step, make it
durable; at the end hand the final head to every site.

Nothing here knows Flower. A `Transport` carries bytes to a named site and brings replies back; `central/app.py` gives
one over Flower's Grid, the unit tests one in memory with the same codec.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from central.aggregate import Aggregator, Update, norm, screen
from central.store import RoundRecord, RunStore
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import RunPlan
from sspformer.contract.task import RoundTask, agreed_metrics, plan_digest, seal_task
from sspformer.contract.tensors import Delta, Shapes, decode, digest_tensors, encode, rounded, zeros

MAX_TRIES = 3  # how often one site is asked in one round
RETRY_S = 1.0  # pause before a site that failed is asked again
OFFLINE_GRACE_S = 30.0  # how long a quorum waits for a site that is not connected
POLL_S = 0.1  # pause between looks for replies; it grows with the round, so that long training is left in peace
SLOWEST_POLL_S = 0.5
ROSTER_S = 1.0  # how often the list of connected sites is read

# Asking again would bring the same answer: the site has decided.
_DECIDED = frozenset(code.value for code in Code) - {Code.INTERNAL.value, Code.GATEWAY.value}


@dataclass(frozen=True)
class Request:
    """What one site is asked: two signed texts and the global difference they speak of."""

    plan: bytes
    task: bytes
    tensors: bytes
    round: int
    kind: Literal["train", "final"]
    ttl_s: float

    @property
    def size(self) -> int:
        """Bytes that travel."""
        return len(self.plan) + len(self.task) + len(self.tensors)


@dataclass(frozen=True)
class Reply:
    """What one site answered: an update, or a code. `request` is the task that it answers."""

    site: str
    task: bytes
    tensors: bytes = b""
    metrics: Mapping[str, object] = field(default_factory=dict)
    code: str | None = None


class Transport(Protocol):
    """Carries requests to sites. Delivery may fail; a reply may come late, twice or never."""

    def online(self) -> Mapping[str, str]:
        """Connected sites, each with the stamp of its connection. A new stamp means: what it held is lost."""

    def send(self, requests: Mapping[str, Request]) -> None:
        """Send one request to each named site."""

    def receive(self) -> Sequence[Reply]:
        """Replies that arrived since the last call."""


class Clock(Protocol):
    """Time that tests can move."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""


class WallClock:
    """The clock of the machine."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)


@dataclass(frozen=True)
class Run:
    """Everything that is fixed for a run."""

    plan: RunPlan
    sites: tuple[str, ...]
    shapes: Shapes
    store: RunStore
    key: Ed25519PrivateKey
    transport: Transport
    clock: Clock = field(default_factory=WallClock)
    say: Callable[[str], None] = print


def run_rounds(run: Run) -> Delta:
    """Run all rounds that have no checkpoint yet, then deliver the final head.

    The result is a function of the plan, the published head and the updates: a run that was killed and resumed ends
    with the same bits as one that was not, if the same sites took part.

    Returns:
        The final global difference to the published head.

    Raises:
        Refused: E-QUORUM, too few sites answered in time; E-STATE, the checkpoint is damaged.
    """
    aggregator = Aggregator(run.plan.aggregation, run.plan.weights)
    roster = _Roster(run)

    number, delta = _resume(run, aggregator)
    while number < run.plan.rounds:
        number += 1
        began = run.clock.now()
        run.store.set_status("running", round=number, rounds=run.plan.rounds)

        request = _request(run, number, "train", delta)
        collected = _collect(run, roster, request)
        updates, refused = screen(collected.updates, run.plan.max_update_norm)
        missing = collected.missing | refused
        if len(updates) < run.plan.quorum:
            raise _no_quorum(run, number, updates, missing)

        step = aggregator.step(number, updates)
        # Both sides work with the difference as it travels, so rounding to fp16 happens here and once.
        delta = rounded({name: delta[name] + step[name] for name in delta})
        record = RoundRecord(
            round=number,
            sites=tuple(sorted(update.site for update in updates)),
            missing=missing,
            seconds=round(run.clock.now() - began, 3),
            bytes_up=collected.bytes_up,
            bytes_down=collected.bytes_down,
            update_norm=norm(step),
            head=digest_tensors(delta),
            ended_at=time.time(),
            metrics=collected.metrics,
        )
        run.store.commit(record, delta, aggregator.state())
        run.say(f"round {number}/{run.plan.rounds}: {len(updates)} sites, {record.seconds:.1f} s")

    _deliver(run, roster, delta)
    return delta


def _resume(run: Run, aggregator: Aggregator) -> tuple[int, Delta]:
    checkpoint = run.store.latest(run.shapes, stateful=run.plan.aggregation == "fedadam")
    if checkpoint is None:
        return 0, zeros(run.shapes)
    aggregator.restore(checkpoint.state)
    run.say(f"resuming after round {checkpoint.round}")
    return checkpoint.round, checkpoint.delta


def _request(run: Run, number: int, kind: Literal["train", "final"], delta: Delta) -> Request:
    task = RoundTask(
        plan_digest=plan_digest(run.plan), run=run.plan.run, round=number, head_digest=digest_tensors(delta), kind=kind
    )
    return Request(run.store.plan, seal_task(task, run.key), encode(delta), number, kind, run.plan.deadline_s)


def _deliver(run: Run, roster: _Roster, delta: Delta) -> None:
    """Hand the final head out. A site that is away gets it when the run is resumed; that fails nothing."""
    run.store.set_status("delivering", round=run.plan.rounds, rounds=run.plan.rounds)
    *_, last = run.store.records()
    request = _request(run, run.plan.rounds + 1, "final", delta)
    collected = _collect(run, roster, request, awaited=frozenset(last.sites))
    run.store.set_status(
        "finished",
        round=run.plan.rounds,
        rounds=run.plan.rounds,
        head=digest_tensors(delta),
        delivered=sorted(collected.acknowledged),
        undelivered=collected.missing,
    )


# -- collecting the answers of one round -------------------------------------------------------------------------------


@dataclass
class _Asked:
    """How it stands with one site in one round."""

    tries: int = 0
    stamp: str = ""
    open: bool = False  # a request is out and unanswered
    not_before: float = 0.0
    code: str | None = None


@dataclass
class _Collected:
    updates: list[Update] = field(default_factory=list)
    acknowledged: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


class _Roster:
    """Which sites are connected now, and since when one is not. Lives as long as the run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._read_at = float("-inf")
        self.stamps: Mapping[str, str] = {}
        self._seen = dict.fromkeys(run.sites, run.clock.now())

    def refresh(self) -> None:
        now = self._run.clock.now()
        if now - self._read_at >= ROSTER_S:
            self.stamps, self._read_at = self._run.transport.online(), now
            self._seen |= dict.fromkeys(self.stamps, now)

    def gone(self, site: str) -> bool:
        """Away for so long that a quorum need not wait."""
        return site not in self.stamps and self._run.clock.now() - self._seen[site] > OFFLINE_GRACE_S


def _collect(run: Run, roster: _Roster, request: Request, awaited: frozenset[str] | None = None) -> _Collected:
    """Ask every site and wait: for all of them, for those that can still answer, or for the deadline.

    With `awaited`, the other sites are asked but not waited for.

    A site is asked again, at most MAX_TRIES times, when it failed without having decided anything or when its
    connection is a new one. The site keeps its reply, so a second request for the same round costs it nothing.
    """
    collected = _Collected()
    asked = {site: _Asked() for site in run.sites}
    began = run.clock.now()
    deadline = began + request.ttl_s
    while True:
        roster.refresh()
        now = run.clock.now()
        due = [site for site, state in asked.items() if _is_due(state, roster.stamps.get(site), now)]
        due = [site for site in due if site not in collected.acknowledged]
        if due:
            run.transport.send(dict.fromkeys(due, request))
        for site in due:
            state = asked[site]
            state.tries, state.stamp, state.open = state.tries + 1, roster.stamps[site], True
            collected.bytes_down[site] = collected.bytes_down.get(site, 0) + request.size

        for reply in run.transport.receive():
            if reply.site in asked and reply.task == request.task and reply.site not in collected.acknowledged:
                _take(run, request, reply, asked[reply.site], collected)

        waiting = [
            site
            for site in run.sites
            if site not in collected.acknowledged
            and not _has_ended(asked[site])
            and (awaited is None or site in awaited)
        ]
        enough = len(collected.acknowledged) >= (run.plan.quorum if request.kind == "train" else 0)
        if not waiting or (enough and all(roster.gone(site) for site in waiting)) or run.clock.now() >= deadline:
            break
        run.clock.sleep(min(SLOWEST_POLL_S, max(POLL_S, 0.05 * (run.clock.now() - began))))
    collected.missing = {
        site: state.code or ("late" if state.tries else "offline")
        for site, state in asked.items()
        if site not in collected.acknowledged
    }
    return collected


def _is_due(state: _Asked, stamp: str | None, now: float) -> bool:
    if stamp is None or _has_ended(state) or state.tries >= MAX_TRIES or now < state.not_before:
        return False
    return not state.open or stamp != state.stamp


def _has_ended(state: _Asked) -> bool:
    """The site said no, or failed as often as it may."""
    return state.code is not None and (state.code in _DECIDED or (state.tries >= MAX_TRIES and not state.open))


def _take(run: Run, request: Request, reply: Reply, state: _Asked, collected: _Collected) -> None:
    """Accept a reply, or note its code so that the site is asked again or left out."""
    state.open = False
    code = reply.code
    if code is None and request.kind == "train":
        try:
            if len(reply.tensors) > largest_reply(run.shapes):
                raise Refused(Code.TENSORS, "A head update is larger than its tensors.", "See to that site.")
            tensors = decode(reply.tensors, run.shapes)
        except Refused as refusal:
            code = refusal.code.value
        else:
            said = agreed_metrics(reply.metrics)
            collected.updates.append(Update(reply.site, tensors, said.get("patients_bucket", 1.0)))
            collected.metrics[reply.site] = said
    collected.bytes_up[reply.site] = collected.bytes_up.get(reply.site, 0) + len(reply.tensors)
    if code is None:
        collected.acknowledged.add(reply.site)
        return
    # What is not one of the agreed codes is a text from outside: it is neither shown nor kept.
    state.code = code if code in {known.value for known in Code} else Code.INTERNAL.value
    state.not_before = run.clock.now() + RETRY_S


def largest_reply(shapes: Shapes) -> int:
    """Most bytes that an encoded update of these shapes can have: zstd adds a little to what it cannot compress."""
    plain = 2 * sum(math.prod(shape) for shape in shapes.values())
    return len(encode(zeros(shapes))) + plain + plain // 128 + 1024


def _no_quorum(run: Run, number: int, updates: Sequence[Update], missing: Mapping[str, str]) -> Refused:
    said = ", ".join(f"{site} {code}" for site, code in sorted(missing.items()))
    run.store.set_status("failed", code=Code.QUORUM.value, round=number, rounds=run.plan.rounds, missing=dict(missing))
    return Refused(
        Code.QUORUM,
        f"Round {number} has {len(updates)} of {run.plan.quorum} needed updates ({said or 'no site is admitted'}).",
        f"See to those sites, then: central run STATE --resume {run.plan.run}",
    )
