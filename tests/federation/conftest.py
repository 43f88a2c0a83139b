"""One federation of real processes for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.federation.stage import SITES, Process, Stage


class Federation(Stage):
    """A stage whose coordinator and sites run. `unbroken` is the head after two rounds in which nothing went wrong."""

    coordinator: Process
    sites: dict[str, Process]
    unbroken: str

    def start_missing_sites(self) -> None:
        """Bring back a site that a test ended."""
        ended = [name for name, process in self.sites.items() if process.poll() is not None]
        self.sites |= self.start_sites(ended, EVIL_MARKS=str(self.marks()))

    def marks(self) -> Path:
        return self.root / "marks-locked"


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    stage = Federation(tmp_path_factory.mktemp("federation"))
    try:
        stage.coordinator = stage.serve()
        stage.marks().mkdir()
        stage.sites = stage.start_sites(SITES, EVIL_MARKS=str(stage.marks()))
        store = stage.completed("unbroken", rounds=2)
        stage.unbroken = store.status()["head"]
        yield stage
    finally:
        stage.close()
