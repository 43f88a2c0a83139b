"""`make bench`: print the ratios and write them to runs/bench/."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tests.bench.measure import Ratio

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
_PACKAGES = ("sspformer-onsite", "torch", "flwr", "opacus", "numpy")


def main(
    repetitions: Annotated[int, typer.Option(min=1, help="Pairs of steps.")] = 10,
    runs: Annotated[int, typer.Option(min=1, help="Pairs of federated runs, four rounds each.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a training step; a site's default is 1.")] = 1,
    only: Annotated[str, typer.Option(help="steps, rounds or memory; all of them without it.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the JSON.")] = Path("runs/bench"),
) -> None:
    """Measure ratios side by side, so that the machine's own speed cancels."""
    console = Console()
    start = time.monotonic()
    ratios: list[Ratio] = []
    memory: dict[str, dict[str, list[float]]] = {}
    # Written after each part: a part that fails on a busy machine does not take the others along.
    if only in ("", "steps"):
        from tests.bench.steps import step_ratios

        with console.status("training steps of preset paper"):
            ratios += step_ratios(repetitions, threads)
        console.print(_ratio_table(ratios))
        _write(out, ratios, memory)
    if only in ("", "rounds"):
        from tests.bench.rounds import round_ratio

        with console.status("rounds, ours and stock Flower's in turn"):
            ratio, memory["trivial fit, ours and stock side by side"] = round_ratio(runs)
        ratios.append(ratio)
        console.print(_ratio_table([ratio]))
        _write(out, ratios, memory)
    if only in ("", "memory"):
        from tests.bench.rounds import peak_memory

        with console.status("a federation that trains with DP, for its memory"):
            memory["training with DP, packaged tiny encoder"] = peak_memory()
        _write(out, ratios, memory)
    for title, by_role in memory.items():
        console.print(_memory_table(title, by_role))
    missed = sum(not ratio.holds for ratio in ratios)
    console.print(f"{len(ratios) - missed} pass, {missed} miss. {time.monotonic() - start:.0f} s, {out}/bench.json")


def _ratio_table(ratios: list[Ratio]) -> Table:
    table = Table(title="Ratios, measured side by side")
    for name in ("what", "median", "min–max", "pairs", "want", ""):
        table.add_column(name, justify="left" if name == "what" else "right")
    for ratio in ratios:
        values = ratio.values
        table.add_row(
            f"{ratio.name}\n[dim]{ratio.note}[/dim]",
            f"{ratio.median:.2f}",
            f"{min(values):.2f}–{max(values):.2f}",
            str(len(values)),
            f"{'≥' if ratio.side == 'at least' else '≤'} {ratio.want:g}",
            "[green]pass[/green]" if ratio.holds else "[red]miss[/red]",
        )
    return table


def _memory_table(title: str, by_role: dict[str, list[float]]) -> Table:
    table = Table(title=f"Peak resident memory, MiB: {title}")
    for name in ("process", "number", "largest", "smallest"):
        table.add_column(name, justify="left" if name == "process" else "right")
    for role, peaks in by_role.items():
        table.add_row(role, str(len(peaks)), f"{max(peaks):.0f}", f"{min(peaks):.0f}")
    return table


def _write(out: Path, ratios: list[Ratio], memory: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in _PACKAGES},
        "ratios": [ratio.as_dict() for ratio in ratios],
        "peak_memory_mib": memory,
    }
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
