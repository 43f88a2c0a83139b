"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0


@contextmanager
def shown() -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``progress(what, done, total)``; a total of 0 means that it is not known. Everything goes to stderr."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total or None)

        yield update


def _lines() -> Callable[[str, int, int], None]:
    last: dict[str, float] = {}

    def update(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if (done == total and what in last) or now - last.get(what, now - LINE_EVERY_S + 2) >= LINE_EVERY_S:
            last[what] = now
            print(f"{what}: {done}" + (f"/{total}" if total else ""), file=sys.stderr, flush=True)
        last.setdefault(what, now - LINE_EVERY_S + 2)

    return update
