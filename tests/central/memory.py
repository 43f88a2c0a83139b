"""A federation in memory: the real rounds, codec, seals and store; only the network and the clock are made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from central.rounds import Reply, Request, Run
from central.store import RunStore
from sspformer.contract.plan import RunPlan
from sspformer.contract.task import open_plan, open_task, seal_plan
from sspformer.contract.tensors import Delta, decode, encode

SHAPES = {"decoder.weight": (5, 3), "tail.bias": (3,), "tail.scale": ()}
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NOTHING = "sha256:" + 64 * "0"

Behaviour = Callable[["MemorySite", Request, Delta], Reply | None]


def make_plan(**changes: object) -> RunPlan:
    fields: dict[str, object] = {
        "run": "test",
        "encoder": NOTHING,
        "head": NOTHING,
        "rounds": 3,
        "quorum": 2,
        "deadline_s": 60.0,
    }
    return RunPlan.model_validate(fields | changes)


def honest_update(name: str, number: int, delta: Mapping[str, np.ndarray], scale: float = 1e-3) -> Delta:
    random = np.random.default_rng([number, *name.encode()])
    return {
        key: (random.normal(0, scale, value.shape) - 0.1 * value).astype(np.float32) for key, value in delta.items()
    }


def honest(site: MemorySite, request: Request, delta: Delta) -> Reply:
    update = honest_update(site.name, request.round, delta)
    return Reply(site.name, request.task, encode(update), {"patients_bucket": 8, "steps": 2, "secret": 1.0})


def says(code: str) -> Behaviour:
    return lambda site, request, delta: Reply(site.name, request.task, code=code)


def silent(site: MemorySite, request: Request, delta: Delta) -> None:
    return None


@dataclass
class MemorySite:
    """Answers a request after `delay_s`, as a queue of behaviours says; the last one stays."""

    name: str
    behaviours: list[Behaviour] = field(default_factory=lambda: [honest])
    delay_s: float = 1.0
    stamp: str = "first"
    online_from: float = 0.0
    asked: list[tuple[int, str]] = field(default_factory=list)
    final: Delta | None = None


@dataclass
class MemoryClock:
    """Time that passes only when someone sleeps."""

    time: float = 0.0
    at: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        due = [event for event in self.at if event[0] <= self.time]
        self.at = [event for event in self.at if event[0] > self.time]
        for _, act in due:
            act()


class MemoryTransport:
    """Delivers to sites and back. Verifies seals with the coordinator's public key as a site does."""

    def __init__(self, sites: Sequence[MemorySite], clock: MemoryClock) -> None:
        self.sites = {site.name: site for site in sites}
        self.clock = clock
        self.mail: list[tuple[float, Reply]] = []

    def online(self) -> dict[str, str]:
        return {s.name: s.stamp for s in self.sites.values() if s.online_from <= self.clock.now()}

    def send(self, requests: Mapping[str, Request]) -> None:
        for name, request in requests.items():
            site = self.sites[name]
            plan = open_plan(request.plan, [KEY.public_key()])
            task = open_task(request.task, [KEY.public_key()], plan)
            delta = decode(request.tensors, SHAPES)
            site.asked.append((task.round, task.kind))
            if task.kind == "final":
                site.final = delta
                self.mail.append((self.clock.now() + site.delay_s, Reply(name, request.task)))
                continue
            behave = site.behaviours[0] if len(site.behaviours) == 1 else site.behaviours.pop(0)
            reply = behave(site, request, delta)
            if reply is not None:
                self.mail.append((self.clock.now() + site.delay_s, reply))

    def receive(self) -> list[Reply]:
        arrived = [reply for at, reply in self.mail if at <= self.clock.now()]
        self.mail = [(at, reply) for at, reply in self.mail if at > self.clock.now()]
        return arrived


def make_run(folder: Path, sites: Sequence[MemorySite], plan: RunPlan | None = None) -> Run:
    """A run over a folder; a second call over the same folder resumes."""
    plan = plan or make_plan()
    store = RunStore(folder)
    if not (folder / "plan.json").exists():
        store = RunStore.create(folder, seal_plan(plan, KEY))
    clock = MemoryClock()
    names = tuple(sorted(site.name for site in sites))
    said: list[str] = []
    return Run(plan, names, SHAPES, store, KEY, MemoryTransport(sites, clock), clock, said.append)
