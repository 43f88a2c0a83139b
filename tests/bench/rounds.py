"""Seconds per round: this federation against Flower as it comes. Both stay up; their runs take turns."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from central.app_bundle import program
from central.registry import Publication
from site_client.folder import SiteFolder
from sspformer.contract.supervise import die_with_parent, free_port, quiet_environment
from sspformer.reference import ENCODER, HEAD
from tests.bench.measure import Ratio
from tests.bench.memory import Peaks, watched
from tests.bench.phantoms import make_dataset
from tests.federation.stage import SITES, Stage
from tests.trust import join, make_federation

STOCK_APP = Path(__file__).with_name("stock")
ROUNDS = 4  # of one run
PATIENCE_S = 600.0


class PatientStage(Stage):
    """A stage on a machine that may be busy: a bench measures, it does not judge how long a start takes."""

    def wait(self, done: Callable[[], bool], timeout_s: float, process: subprocess.Popen[bytes] | None = None) -> None:
        """Wait at least `PATIENCE_S`."""
        super().wait(done, max(timeout_s, PATIENCE_S), process)


class Ours:
    """The real coordinator and three sites, TLS and signatures included, with a trivial fit."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self._stage = PatientStage(root)
        self._runs = 0

    def start(self, stack: ExitStack) -> None:
        """Bring everything up; `stack` brings it down."""
        stack.callback(self._stage.close)
        self._stage.serve()
        self._stage.start_sites()

    def run(self) -> list[float]:
        """Seconds of each round of one run."""
        self._runs += 1
        name = f"bench-{self._runs}"
        plan = self._stage.plan(name, rounds=ROUNDS, quorum=len(SITES))
        code = self._stage.finish(self._stage.run(str(plan), log=name), PATIENCE_S)
        if code != 0:
            raise RuntimeError(f"the run ended with {code}\n{self._stage.logs()}")
        records = list(self._stage.store(name).records())
        # From the end of one round to the end of the next: nothing between two rounds is left out.
        return [records[0].seconds, *(b.ended_at - a.ended_at for a, b in pairwise(records))]


class Stock:
    """Flower's programs with their defaults: subprocess isolation, state in memory, no TLS, `FedAvg.start`."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self._root = root
        self._port = free_port()
        self._environment = quiet_environment(FLWR_HOME=str(root / "home"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._runs = 0

    def start(self, stack: ExitStack) -> None:
        """Bring everything up; `stack` brings it down."""
        stack.callback(self._end)
        (self._root / "home").mkdir()
        (self._root / "home" / "config.toml").write_text(
            '[superlink]\ndefault = "stock"\n\n'
            f'[superlink.stock]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )
        shutil.copytree(STOCK_APP, self._root / "app")
        # Its default would ask a package index for the app's dependencies, which are installed: unfair to it, so off.
        self._launch(
            *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self._port)),
            "--disable-runtime-dependency-installation",
        )
        time.sleep(5)
        for _ in SITES:
            self._launch(
                *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self._port}"),
                *("--host", "127.0.0.1", "--port", str(free_port())),
            )

    def run(self) -> list[float]:
        """Seconds of each round of one run."""
        self._runs += 1
        marks = self._root / f"marks-{self._runs}"
        config = f'rounds={ROUNDS} sites={len(SITES)} marks="{marks}"'
        subprocess.run(
            [program("flwr"), "run", str(self._root / "app"), "stock", "--run-config", config],
            env=self._environment,
            check=True,
            capture_output=True,
            timeout=120,
        )
        deadline = time.monotonic() + PATIENCE_S
        while not marks.exists() or len(marks.read_text().splitlines()) <= ROUNDS:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the stock run did not finish\n{(self._root / 'log').read_text()[-4000:]}")
            time.sleep(0.1)
        stamps = [float(line.split()[1]) for line in marks.read_text().splitlines()]
        return [b - a for a, b in pairwise(stamps)]

    def _launch(self, name: str, *arguments: str) -> None:
        with (self._root / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [program(name), *arguments],
                    env=self._environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=die_with_parent,
                )
            )

    def _end(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def round_ratio(repetitions: int) -> tuple[Ratio, dict[str, list[float]]]:
    """Ours over stock, round by round, and the peak memory of the stock side's and our processes with a trivial fit."""
    ours_s: list[float] = []
    stock_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ours, stock = Ours(Path(folder) / "ours"), Stock(Path(folder) / "stock")
        peaks = stack.enter_context(watched())
        ours.start(stack)
        stock.start(stack)
        for _ in range(repetitions):
            ours_s += ours.run()
            stock_s += stock.run()
    note = (
        f"{len(SITES)} sites, 0.9 M values, trivial fit; ours with TLS, signatures, durable state and fp16 updates, "
        "stock plain with fp32"
    )
    ratio = Ratio("round / stock Flower round, subprocess isolation", ours_s, stock_s, 0.4, "at most", note)
    return ratio, peaks.by_role()


class RealStage(PatientStage):
    """A stage whose sites train: the packaged encoder and head, real workers, patients made of ellipsoids."""

    def __init__(self, root: Path, patients: int) -> None:
        self.root = root
        root.mkdir()
        make_dataset(root / "bids", patients)
        self.federation = make_federation(root / "central")
        publication = Publication(self.federation)
        publication.publish(encoder=ENCODER, head=HEAD)
        for name in SITES:
            folder: SiteFolder = join(self.federation, self.site(name), name)
            for artifact in publication.manifest().artifacts:
                source = publication.blob_path(artifact.digest)
                folder.artifact_path(artifact).write_bytes(source.read_bytes())
        self.started = []


def peak_memory() -> dict[str, list[float]]:
    """MiB of every process of a federation of three sites that trains two rounds with DP, by role."""
    private = {
        "sample_rate": 0.2,
        "expected_patients": 1.6,
        "noise_multiplier": 1.31,
        "clipping_norm": 0.1,
        "learning_rate": 3e-4,
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stage = RealStage(Path(folder) / "real", patients=10)
        stack.callback(stage.close)
        peaks: Peaks = stack.enter_context(watched())
        stage.serve()
        for name in SITES:
            process = stage.launch("site_client.cli", "start", str(stage.site(name)), log=name)
            stage.wait(lambda name=name: "is up" in stage.log(name), 60, process)
        plan = stage.plan("memory", rounds=2, quorum=len(SITES), private=private, deadline_s=120.0)
        if stage.finish(stage.run(str(plan)), PATIENCE_S) != 0:
            raise RuntimeError(f"the run failed\n{stage.logs()}")
    return peaks.by_role()
