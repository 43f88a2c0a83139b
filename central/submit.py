"""`central run`: seal a plan, submit it, follow its rounds, and submit again when the server app dies."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from central.app_bundle import CONNECTION, bundle_folder, flower_environment, prepare_flower_home, program
from central.federation import Federation
from central.registry import Publication, SiteRegistry
from central.store import RoundRecord, RunStore, open_run, runs_folder
from sspformer.contract.durable import make_private_folder, write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import RunPlan
from sspformer.contract.settings import load_settings
from sspformer.contract.task import seal_plan

START_S = 90.0  # how long a submitted server app may take to take up its run
FLWR_S = 120.0  # how long one of Flower's commands may take
FEW_SITES = 3
FEW_SITES_WARNING = (
    "with fewer than three hospitals each can work out the other's update from the global head; "
    "only differential privacy stands between them."
)
MAX_LOSSES = 3  # server apps that may die in a row without closing a round
_POLL_S = 0.25


class _PlanFile(BaseModel):
    """A plan as its author writes it: any key of a plan; the digests may be left to the published manifest."""

    model_config = ConfigDict(extra="allow")


def run_plan(root: Path, plan_path: Path) -> None:
    """Make a run from a plan file and follow it to its end.

    Raises:
        Refused: E-CONFIG, the plan is wrong; E-STATE, the run exists; E-GATEWAY, the coordinator is not being served;
            E-QUORUM, too few sites answered.
    """
    federation = Federation.open(root.absolute())
    plan = read_plan(plan_path, federation)
    if plan.quorum > len(SiteRegistry(federation.sites_path).sites()):
        raise Refused(
            Code.CONFIG,
            f"{plan_path}: quorum {plan.quorum} is more than the admitted sites.",
            "Admit sites, or lower it.",
        )
    _check_served(federation)
    console = Console()
    warn_of_few_sites(federation, console)
    store = RunStore.create(runs_folder(federation) / plan.run, seal_plan(plan, federation.signing_key()))
    _Follower(federation, store, plan, console).follow()


def resume_run(root: Path, run: str) -> None:
    """Follow an existing run again, and continue it from its last checkpoint when nothing runs it.

    Raises:
        Refused: as `run_plan`.
    """
    federation = Federation.open(root.absolute())
    store, plan = open_run(federation, run)
    _check_served(federation)
    console = Console()
    warn_of_few_sites(federation, console)
    _Follower(federation, store, plan, console).follow()


def warn_of_few_sites(federation: Federation, console: Console) -> None:
    """Say what two hospitals can learn of each other; the run goes on."""
    count = len(SiteRegistry(federation.sites_path).sites())
    if count < FEW_SITES:
        console.print(f"Warning: {count} admitted: {FEW_SITES_WARNING}", highlight=False, soft_wrap=True)


def read_plan(path: Path, federation: Federation) -> RunPlan:
    """Read a plan file and fill in the published digests.

    Raises:
        Refused: E-CONFIG naming the key; E-DIGEST, the plan names artifacts that are not the published ones.
    """
    given = load_settings(path, _PlanFile).model_dump()
    manifest = Publication(federation).manifest()
    published = {"encoder": manifest.encoder.digest, "head": manifest.head.digest}
    for role, digest in published.items():
        if given.get(role) not in (None, digest):
            raise Refused(
                Code.DIGEST,
                f"{path}: key '{role}' is not the published {role}, {digest}.",
                "Leave the key out, or publish that file first.",
            )
    try:
        return RunPlan.model_validate(given | published)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = "is not known" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise Refused(Code.CONFIG, f"{path}: key '{key or 'plan'}': {reason}.", "Correct it and run again.") from None


@dataclass
class _Follower:
    """Watches one run's folder, and sees to it that a server app works on it."""

    federation: Federation
    store: RunStore
    plan: RunPlan
    console: Console
    _shown: int = 0
    _flower_run: str | None = None

    def follow(self) -> None:
        """Until the run is finished or has failed."""
        if self.store.status()["state"] == "finished":
            self._show_rounds()
            self.console.print(f"Run {self.plan.run} is finished.")
            return
        losses = 0
        closed = self.store.last_round()
        if not self.store.is_held():
            self._submit()
        with self.console.status("") as waiting:
            while True:
                self._show_rounds()
                status = self.store.status()
                if status["state"] == "finished":
                    break
                if status["state"] == "failed":
                    raise Refused(Code(status["code"]), *_split(status.get("message", ""), self.plan.run))
                waiting.update(f"round {status.get('round', 1)} of {self.plan.rounds}: {status['state']}")
                if not self._is_lost():
                    time.sleep(_POLL_S)
                    continue
                losses = 1 if self.store.last_round() > closed else losses + 1
                closed = self.store.last_round()
                if losses > MAX_LOSSES:
                    self.store.set_status("lost", round=closed, rounds=self.plan.rounds)
                    raise Refused(
                        Code.STATE,
                        f"The server app of run {self.plan.run} died {losses} times without closing a round.",
                        f"Read {self.federation.root / 'logs' / 'superexec.log'}",
                    )
                self.console.print(f"The server app ended; continuing after round {closed}.")
                self._submit()
        self._show_rounds()
        delivered = self.store.status().get("delivered", [])
        self.console.print(
            f"Run {self.plan.run} is finished. Final head delivered to: {', '.join(delivered) or 'nobody'}."
        )

    def _is_lost(self) -> bool:
        """No living process holds the run, and it is not over."""
        if self.store.is_held():
            return False
        return self.store.status()["state"] not in ("finished", "failed")

    def _submit(self) -> None:
        """Have Flower start a server app for the run and wait until it has taken the run up."""
        if self._flower_run is not None:
            self._flwr("stop", self._flower_run, CONNECTION, may_fail=True)  # it may have ended by itself
        prepare_flower_home(self.federation)
        self.store.set_status("waiting", round=self.store.last_round(), rounds=self.plan.rounds)
        said = self._flwr(
            *("run", str(bundle_folder(self.federation)), CONNECTION, "--format", "json"),
            *("--run-config", f'run="{self.plan.run}"'),
        )
        self._flower_run = _run_id(said)
        if self._flower_run is None:
            raise Refused(
                Code.STATE,
                "The SuperLink did not take the run.",
                f"Read {self.federation.root / 'logs' / 'flwr.log'}; then run with --resume {self.plan.run}",
            )
        deadline = time.monotonic() + START_S
        while not self.store.is_held() and self.store.status()["state"] == "waiting":
            if time.monotonic() > deadline:
                raise Refused(
                    Code.STATE,
                    f"No server app took up run {self.plan.run} within {START_S:.0f} s.",
                    f"Read {self.federation.root / 'logs' / 'superexec.log'}",
                )
            time.sleep(_POLL_S)

    def _flwr(self, *arguments: str, may_fail: bool = False) -> str:
        """Call one of Flower's commands; what it printed replaces the last one's in a log.

        Raises:
            Refused: E-STATE, it failed or took too long.
        """
        log = self.federation.root / "logs" / "flwr.log"
        try:
            done = subprocess.run(
                [program("flwr"), *arguments],
                env=flower_environment(self.federation),
                capture_output=True,
                text=True,
                timeout=FLWR_S,
            )
        except subprocess.TimeoutExpired:
            if may_fail:
                return ""
            raise Refused(
                Code.STATE,
                f"The SuperLink did not answer `flwr {arguments[0]}` within {FLWR_S:.0f} s.",
                f"Read {self.federation.root / 'logs' / 'superlink.log'}; then run with --resume {self.plan.run}",
            ) from None
        make_private_folder(log.parent)
        write_file(log, (done.stdout + done.stderr).encode())
        if done.returncode != 0 and not may_fail:
            raise Refused(
                Code.STATE,
                f"`flwr {arguments[0]}` ended with status {done.returncode}.",
                f"Read {log}; then run with --resume {self.plan.run}",
            )
        return done.stdout

    def _show_rounds(self) -> None:
        for record in self.store.records():
            if record.round > self._shown:
                self.console.print(round_line(record, self.plan.rounds), highlight=False, soft_wrap=True)
                self._shown = record.round


def round_line(record: RoundRecord, rounds: int) -> str:
    """One line about one closed round."""
    missing = "".join(f", {site} {code}" for site, code in sorted(record.missing.items()))
    up, down = _size(sum(record.bytes_up.values())), _size(sum(record.bytes_down.values()))
    return (
        f"round {record.round}/{rounds}  {len(record.sites)} sites ({', '.join(record.sites)}{missing})  "
        f"{record.seconds:.1f} s  up {up}  down {down}  update norm {record.update_norm:.3g}"
    )


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _check_served(federation: Federation) -> None:
    config = federation.config
    try:
        socket.create_connection((config.superlink_address, config.superlink_port), timeout=2.0).close()
    except OSError:
        raise Refused(
            Code.GATEWAY,
            f"The coordinator in {federation.root} is not being served.",
            f"Run in another terminal: central serve {federation.root}",
        ) from None


def _run_id(said: str) -> str | None:
    """Flower's number of the run, from the JSON that `flwr run` prints."""
    start = said.find("{")
    if start < 0:
        return None
    try:
        return str(json.loads(said[start : said.rfind("}") + 1])["run-id"])
    except (ValueError, KeyError):
        return None


def _split(message: str, run: str) -> tuple[str, str]:
    """What and next step of a refusal that was written as one line."""
    what, _, next_step = message.partition(": ")[2].partition(" Next: ")
    return what or f"Run {run} failed.", next_step or f"central run STATE --resume {run}"
