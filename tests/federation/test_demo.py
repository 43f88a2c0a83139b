"""The demo as a person runs it: real processes over TLS on loopback, from nothing to the report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from central.report.summary import read_summary
from site_client.privacy.accounting import epsilon
from site_client.privacy.events import Events
from sspformer.contract.privacy import MechanismEvent

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(540)]


class Watched:
    """A running demo, its lines, and every process it ever had below it.

    Args:
        out: its folder.
        options: further options of `central demo`.
    """

    def __init__(self, out: Path, *options: str) -> None:
        command = [sys.executable, "-m", "central.cli", "demo", "--out", str(out), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self.family: set[psutil.Process] = set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def watch(self, until: str | None = None, timeout_s: float = 420.0) -> None:
        """Collect its processes until a line appears, or until it ends."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and not (until and any(until in line for line in list(self.lines))):
            assert time.monotonic() < deadline, "".join(self.lines)
            try:
                self.family.update(psutil.Process(self.process.pid).children(recursive=True))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)
        if self.process.poll() is not None:
            self._reader.join(10)

    def end(self) -> None:
        """See that a test that failed leaves nothing either."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)

    def left_behind(self) -> list[str]:
        """What still runs of all it ever started."""
        return [" ".join(process.cmdline()) for process in self.family if process.is_running()]


Start = Callable[..., Watched]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a demo that ends with the test."""
    demos: list[Watched] = []

    def begin(out: Path, *options: str) -> Watched:
        demos.append(Watched(out, *options))
        return demos[-1]

    yield begin
    for demo in demos:
        demo.end()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


def test_ctrl_c_in_the_middle_of_a_round_leaves_no_process(out: Path, start: Start) -> None:
    demo = start(out, "--patients", "8", "--rounds", "3")
    demo.watch(until="plain round 1/3")
    assert len(demo.family) > 8, "".join(demo.lines)  # gateway, SuperLink, SuperExec, server app, three sites of three
    demo.process.send_signal(signal.SIGINT)
    demo.watch(timeout_s=90)
    assert demo.process.wait(10) == 130
    assert demo.left_behind() == []


def test_demo_runs_to_its_report_over_what_an_interrupted_one_left(out: Path, start: Start) -> None:
    demo = start(out, "--patients", "8", "--rounds", "1")
    demo.watch()
    text = "".join(demo.lines)
    assert demo.process.wait(10) == 0, text
    assert demo.left_behind() == []
    assert "plain round 1/1: 3 hospitals" in text
    assert "private round 1/1: 3 hospitals" in text

    summary = read_summary(out / "summary.json")
    assert [site.name for site in summary.sites] == ["north", "east", "west"]
    assert summary.rounds == summary.rounds_dp == len(summary.seconds_per_round) == 1
    assert summary.dp is not None
    assert 0 < summary.dp.epsilon <= 8
    assert summary.encoder_bytes > summary.bytes_up_per_site_round > 10_000
    assert any("not different people" in line for line in summary.warnings)
    for site in summary.sites:
        assert site.psnr_global > site.psnr_input + 3
        assert [point.round for point in site.history] == [0, 1]
    page = (out / "report.html").read_text()
    assert page.count("<img") > 20
    # Nothing that names a patient is in what people are shown.
    for shown in (page, json.dumps(summary.model_dump()), text):
        assert "sub-" not in shown


def test_missing_folder_is_one_line_and_starts_nothing(tmp_path: Path, start: Start) -> None:
    demo = start(tmp_path / "out", "--site", str(tmp_path / "nowhere"))
    demo.watch(timeout_s=60)
    assert demo.process.wait(10) == 2
    assert demo.lines[-1].startswith("E-DATA: ")
    assert len(demo.lines) == 1
    assert not (tmp_path / "out").exists()


def test_kill_9_of_a_worker_in_a_private_round_forgets_no_epsilon(tmp_path: Path, start: Start) -> None:
    """A real worker dies while it trains on patients: the run finishes, and what it had begun stays on the books."""
    out = tmp_path / "out"
    site = out / "sites" / "north"
    demo = start(out, "--patients", "24", "--rounds", "2")
    reader = threading.Thread(target=demo.watch, daemon=True)
    reader.start()
    deadline = time.monotonic() + 400
    while not (events := kinds(site)) or events[-1] != "STARTED":
        assert time.monotonic() < deadline, "".join(demo.lines)
        assert demo.process.poll() is None, "".join(demo.lines)
        time.sleep(0.005)
    worker = next(p for p in demo.family if is_worker(p, site))
    worker.kill()
    reader.join(420)
    assert demo.process.returncode == 0, "".join(demo.lines)
    assert demo.left_behind() == []
    private = read_summary(out / "summary.json").dp
    assert private is not None
    assert kinds(site).count("STARTED") == kinds(site).count("SPENT") + 1 == 3  # two rounds, and one begun twice
    charged = Events(site / "privacy").charged()
    one_round = MechanismEvent(
        sample_rate=private.sample_rate,
        noise_multiplier=private.noise_multiplier,
        steps=private.steps // 2,
        clipping_norm=private.clipping_norm,
    )
    assert charged == [one_round] * 3
    assert private.epsilon == pytest.approx(epsilon([one_round] * 3, private.delta), abs=1e-3)
    assert private.epsilon > epsilon([one_round] * 2, private.delta) + 0.1  # without the orphan it would say less


def kinds(site: Path) -> list[str]:
    """The site's privacy events, by kind."""
    path = site / "privacy" / "events.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["kind"] for line in lines]


def is_worker(process: psutil.Process, site: Path) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return "site_client.worker" in command and str(site) in command
