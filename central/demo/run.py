"""The demo as a story: found, join, train alone, federate without DP, federate with DP, compare. Start reading here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from central.demo import hospitals as rooms
from central.demo.hospitals import Hospital
from central.demo.plans import PLAIN, PRIVATE, load_plan, write_plan
from central.demo.processes import Programs, running
from central.demo.progress import Progress
from central.demo.results import pictures, published, summarise
from central.report.page import write_report
from central.report.summary import Summary, write_summary
from central.store import RunStore
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import RunPlan

READY_S = 90.0  # how long a coordinator or a hospital may take until it is there
LONG_S = 900.0
POLL_S = 0.2


@dataclass(frozen=True)
class Demo:
    """What a demo is given.

    Args:
        out: folder that everything is written to.
        sites: BIDS folders of real hospitals; without any, three are made from one average brain.
        patients: patients per made hospital.
        seed: decides the made patients.
        rounds: rounds of each run, for a quick look; those of the plans if not given.
    """

    out: Path
    sites: Sequence[Path] = ()
    patients: int = 220
    seed: int = 1
    rounds: int | None = None

    @property
    def state(self) -> Path:
        """The coordinator's folder."""
        return self.out / "coordinator"

    def plan_path(self, run: str) -> Path:
        """Where a run's plan is written before the coordinator seals it."""
        return self.out / "plans" / f"{run}.yaml"

    def head_path(self, run: str) -> Path:
        """Where a run's final head is exported to."""
        return self.out / "heads" / f"{run}.safetensors"


def show_demo(demo: Demo) -> None:
    """Run a demo, tell how it goes, and show what it came to.

    Raises:
        Refused: as `run_demo`.
    """
    progress = Progress()
    try:
        summary = run_demo(demo, progress)
    except KeyboardInterrupt:
        progress.say("Interrupted. Every process of the demo has ended.")
        raise
    progress.show(summary, demo.out)


def run_demo(demo: Demo, progress: Progress) -> Summary:
    """Run a federation from nothing to its report. Every process that it started has ended when it returns.

    Raises:
        Refused: something was refused; the line says what and names the logs.
    """
    given = rooms.given(demo.sites, demo.out)  # refuses a wrong folder before anything is made
    with rooms.claimed(demo.out), running(demo.out / "logs") as programs:
        with progress.phase("hospitals and their MRI"):
            hospitals = given or rooms.make_warped(programs, demo.out, demo.patients, demo.seed)

        with progress.phase("coordinator: keys, encoder, gateway"):
            fingerprint = rooms.found(programs, demo.state)
            _serve(programs, demo.state)

        with progress.phase("hospitals join, download and verify"):
            for hospital in hospitals:
                rooms.join(programs, demo.state, hospital, fingerprint)
            _all(programs, "fetch", hospitals, lambda site: ("site-client", "fetch", site.folder))

        _plans(demo, hospitals)
        with progress.phase("every hospital trains alone"):
            hospitals, left_out = _train_alone(programs, demo, hospitals, progress)
        plain, private = _plans(demo, hospitals)  # again: now every hospital knows how many of its patients are usable

        started = time.time()
        for hospital in hospitals:
            programs.start(_online(hospital), "site-client", "start", hospital.folder)
        for plan, name in ((plain, "without DP"), (private, f"with DP, ε ≤ {rooms.MAX_EPSILON:g}")):
            with progress.phase(f"{plan.rounds} rounds {name}") as live:
                _federate(programs, demo, plan, progress, live)

        with progress.phase("shutdown"):
            programs.stop(*(_online(hospital) for hospital in hospitals))
            programs.stop("central-serve")

        with progress.phase("scores on held-out patients"):
            _all(programs, "evaluate", hospitals, lambda site: _evaluate(demo, site))

        summary = summarise(demo, hospitals, (plain, private), started, progress.phases, left_out)
        write_summary(summary, demo.out / "summary.json")
        write_report(summary, pictures(hospitals, demo.out), demo.out / "report.html")
    return summary


def _train_alone(
    programs: Programs, demo: Demo, hospitals: Sequence[Hospital], progress: Progress
) -> tuple[list[Hospital], list[str]]:
    """Let every hospital train alone. One whose data cannot be used is taken out, and the others carry on.

    Returns:
        The hospitals that are left, and a line about each of the others.

    Raises:
        Refused: E-COHORT, fewer than two hospitals are left.
    """
    for hospital in hospitals:
        options = ("--plan", demo.plan_path(PLAIN))
        programs.start(f"alone-{hospital.name}", "site-client", "finetune", hospital.folder, *options)
    usable, left_out = [], []
    for hospital in hospitals:
        name = f"alone-{hospital.name}"
        try:
            programs.wait(name, timeout_s=LONG_S)
            usable.append(hospital.with_usable(programs.log(name).read_text(errors="replace")))
        except Refused as refusal:
            if refusal.code not in (Code.DATA, Code.COHORT):
                raise
            left_out.append(f"{hospital.name} was left out. {refusal.what}")
            progress.say(f"  {left_out[-1]}")
            programs.run(f"remove-{hospital.name}", "central", "remove", demo.state, hospital.name)
    if len(usable) < 2:
        raise Refused(
            Code.COHORT,
            f"{len(usable)} of {len(hospitals)} hospitals can take part. {' '.join(left_out)}",
            "name folders with at least four patients each.",
        )
    return usable, left_out


def _plans(demo: Demo, hospitals: Sequence[Hospital]) -> tuple[RunPlan, RunPlan]:
    """Write both plans down."""
    manifest = published(demo.state)
    digests = {"encoder": manifest.encoder.digest, "head": manifest.head.digest}
    smallest = min(hospital.declared_patients for hospital in hospitals)
    contrast = rooms.shared_contrast(hospitals)
    plans = [load_plan(run, digests, len(hospitals), smallest, demo.rounds, contrast) for run in (PLAIN, PRIVATE)]
    for plan in plans:
        write_plan(plan, demo.plan_path(plan.run))
    return plans[0], plans[1]


def _serve(programs: Programs, state: Path) -> None:
    """Start the coordinator and wait until both of its ports answer."""
    programs.start("central-serve", "central", "serve", state)
    deadline = time.monotonic() + READY_S
    while not rooms.is_listening(state):
        programs.check()
        if time.monotonic() > deadline:
            raise Refused(
                Code.STATE,
                f"the coordinator is not there after {READY_S:.0f} s.",
                f"read {programs.log('central-serve')} and {state / 'logs'}",
            )
        time.sleep(POLL_S)


def _federate(programs: Programs, demo: Demo, plan: RunPlan, progress: Progress, live: Callable[[str], None]) -> None:
    """Run all rounds of a plan, one line a round, then export the final head."""
    name = f"run-{plan.run}"
    programs.start(name, "central", "run", demo.state, demo.plan_path(plan.run))
    store, shown = RunStore(demo.state / "runs" / plan.run), 0
    deadline = time.monotonic() + LONG_S
    while programs.is_running(name) and time.monotonic() < deadline:
        programs.check()
        for record in list(store.records())[shown:]:
            shown += 1
            up = sum(record.bytes_up.values()) / max(1, len(record.bytes_up)) / 1e3
            line = f"round {record.round}/{plan.rounds}: {len(record.sites)} hospitals, {record.seconds:.1f} s"
            progress.say(f"  {plan.run} {line}, {up:.0f} kB up from each")
            live(f"round {record.round + 1}/{plan.rounds}")
        time.sleep(POLL_S)
    programs.wait(name, timeout_s=1.0)
    demo.head_path(plan.run).parent.mkdir(exist_ok=True)
    export = ("central", "head", "export", demo.state, plan.run, "--output", demo.head_path(plan.run))
    programs.run(f"export-{plan.run}", *export)


def _evaluate(demo: Demo, site: Hospital) -> tuple[str | Path, ...]:
    heads = {"local": site.local_head, "global": demo.head_path(PLAIN), "global_dp": demo.head_path(PRIVATE)}
    named = [part for name, path in heads.items() for part in ("--head", f"{name}={path}")]
    files = ("--json", site.scores(demo.out), "--pictures", site.pictures(demo.out))
    plan = ("--plan", demo.plan_path(PLAIN))  # its contrast and noise
    return ("site-client", "evaluate", site.folder, *plan, *named, *files)


def _all(
    programs: Programs, verb: str, hospitals: Sequence[Hospital], command: Callable[[Hospital], tuple[str | Path, ...]]
) -> None:
    """Run one command at every hospital, side by side."""
    names = [f"{verb}-{hospital.name}" for hospital in hospitals]
    for name, hospital in zip(names, hospitals, strict=True):
        programs.start(name, *command(hospital))
    programs.wait(*names, timeout_s=LONG_S)


def _online(hospital: Hospital) -> str:
    return f"site-{hospital.name}"
