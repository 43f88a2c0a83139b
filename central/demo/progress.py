"""What the demo says while it runs: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from central.report.summary import METHODS, Phase, Summary

SHORT = {"input": "noisy", "nlm": "NLM", "warm": "warm", "local": "local", "global": "global", "global_dp": "DP"}


class Progress:
    """Phases with their times.

    Args:
        console: where to write; made if not given.
    """

    def __init__(self, console: Console | None = None) -> None:
        # highlight=False: numbers stay plain, so that the lines read the same in a log.
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.phases: list[Phase] = []
        self._began = time.monotonic()

    def say(self, line: str) -> None:
        """Write one line."""
        self.console.print(f"[dim]{time.monotonic() - self._began:6.1f} s[/dim]  {line}")

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a part of the run; yields a function that changes what the live line says."""
        began = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(name) as status:
                yield lambda text: status.update(f"{name}: {text}")
        else:
            self.say(f"{name} ...")
            yield lambda text: None
        seconds = time.monotonic() - began
        self.phases.append(Phase(name=name, seconds=round(seconds, 2)))
        self.say(f"{name}: done in {seconds:.1f} s")

    def show(self, summary: Summary, out: Path) -> None:
        """Print the results, the times, and where the report lies."""
        # No box and short heads: readable in a log, and in eighty columns.
        results = Table(title="PSNR inside the head, dB, held-out patients", title_justify="left", box=box.SIMPLE_HEAD)
        results.add_column("hospital", no_wrap=True)
        results.add_column("train/test", justify="right", no_wrap=True)
        for key, _, _ in METHODS:
            results.add_column(SHORT[key], justify="right", no_wrap=True)
        for site in summary.sites:
            values = [site.metric("psnr", key) for key, _, _ in METHODS]
            cells = ["–" if value is None else f"{value:.2f}" for value in values]
            results.add_row(site.name, f"{site.patients_train}/{site.patients_test}", *cells)
        times = Table(title="Time", title_justify="left", box=box.SIMPLE_HEAD)
        times.add_column("phase")
        times.add_column("seconds", justify="right")
        for phase in summary.phases:
            times.add_row(phase.name, f"{phase.seconds:.1f}")
        times.add_row("all", f"{time.monotonic() - self._began:.1f}")
        self.console.print()
        self.console.print(results)
        if summary.dp is not None:
            dp = summary.dp
            self.console.print(
                f"global, DP: ε = {dp.epsilon:.2f} at δ = {dp.delta:g} per patient, the maximum over sites"
            )
        self.console.print()
        self.console.print(times)
        for line in summary.warnings:
            self.console.print(f"\n[bold]Read this:[/bold] {line}")
        self.console.print(f"\nReport: {out / 'report.html'}   Numbers: {out / 'summary.json'}")
