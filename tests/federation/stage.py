"""A whole federation as separate processes on loopback, started by the real commands. Only the fit is trivial."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save

from central.federation import Federation
from central.registry import Publication
from central.store import RunStore
from sspformer.contract.supervise import die_with_parent
from tests.trust import join, make_federation

Process = subprocess.Popen[bytes]
ROOT = Path(__file__).resolve().parents[2]
SITES = ("alpha", "bravo", "charlie")
# The size of the real head, 0.9 M values, in a few tensors.
HEAD = {"decoder.weight": (900, 960), "decoder.bias": (960,), "tail.weight": (40, 960), "tail.scale": (1,)}


class Stage:
    """Folders of a coordinator and three joined sites, and the processes that were started on them."""

    def __init__(self, root: Path, names: Sequence[str] = SITES) -> None:
        self.root = root
        self.federation: Federation = make_federation(root / "central")
        encoder, head = root / "encoder.safetensors", root / "head.safetensors"
        random = np.random.default_rng(0)
        encoder.write_bytes(save({"w": np.zeros((4, 4), np.float32)}))
        head.write_bytes(save({n: random.normal(0, 0.1, s).astype(np.float32) for n, s in HEAD.items()}))
        Publication(self.federation).publish(encoder=encoder, head=head)
        for name in names:
            folder = join(self.federation, self.site(name), name)
            for artifact in Publication(self.federation).manifest().artifacts:
                folder.artifact_path(artifact).write_bytes(
                    Publication(self.federation).blob_path(artifact.digest).read_bytes()
                )
        self.started: list[Process] = []

    def site(self, name: str) -> Path:
        return self.root / name

    def launch(self, *arguments: str, log: str, program: Sequence[str] = (), **environment: str) -> Process:
        """Start `python -m ...`, or another program, with its output in a log; it dies with the test."""
        with (self.root / f"{log}.log").open("ab") as sink:
            process = subprocess.Popen(
                [*(program or (sys.executable, "-m")), *arguments],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
        self.started.append(process)
        return process

    def serve(self) -> Process:
        ups = self.log("serve").count("is up")
        process = self.launch("central.cli", "serve", str(self.federation.root), log="serve")
        self.wait(lambda: self.log("serve").count("is up") > ups, 120, process)
        return process

    def start_sites(self, names: Sequence[str] = SITES, **environment: str) -> dict[str, Process]:
        ups = {name: self.log(name).count("is up") for name in names}
        processes = {
            name: self.launch("tests.federation.site", str(self.site(name)), log=name, **environment) for name in names
        }
        for name, process in processes.items():
            self.wait(lambda name=name: self.log(name).count("is up") > ups[name], 120, process)
        return processes

    def plan(self, run: str, **changes: object) -> Path:
        path = self.root / f"{run}.yaml"
        path.write_text(yaml.safe_dump({"run": run, "rounds": 3, "quorum": 2, "deadline_s": 120.0, **changes}))
        return path

    def run(self, *arguments: str, log: str = "run") -> Process:
        return self.launch("central.cli", "run", str(self.federation.root), *arguments, log=log)

    def completed(self, run: str, **changes: object) -> RunStore:
        """Run a plan to its end."""
        process = self.run(str(self.plan(run, **changes)), log=run)
        assert self.finish(process) == 0, self.logs()
        return self.store(run)

    def hold(self, name: str) -> Path:
        """Make the next round of a site wait; remove the returned file to let it go on."""
        (self.site(name) / "training").unlink(missing_ok=True)
        hold = self.site(name) / "hold"
        hold.touch()
        return hold

    def wait_in_round(self, name: str, process: Process) -> None:
        """Until the held site is in the middle of its round."""
        self.wait((self.site(name) / "training").exists, 120, process)

    def store(self, run: str) -> RunStore:
        return RunStore(self.federation.root / "runs" / run)

    def log(self, name: str) -> str:
        path = self.root / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, done: Callable[[], bool], timeout_s: float, process: Process | None = None) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert process is None or process.poll() is None, f"ended with {process.returncode}\n{self.logs()}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain\n{self.logs()}"
            time.sleep(0.05)

    def finish(self, process: Process, timeout_s: float = 300) -> int:
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished after {timeout_s} s\n{self.logs()}") from None

    def processes(self, *needles: str) -> dict[int, str]:
        """Living processes whose command line names this stage's folder and every needle."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if str(self.root) in line and state != "Z" and all(needle in line for needle in needles):
                    found[int(entry.name)] = line
        return found

    def kill(self, *needles: str) -> None:
        """`kill -9` the one process that matches."""
        found = self.processes(*needles)
        assert len(found) == 1, found
        os.kill(next(iter(found)), signal.SIGKILL)

    def logs(self) -> str:
        texts = []
        for path in sorted(self.root.rglob("*.log")):
            texts.append(f"--- {path.relative_to(self.root)}\n{path.read_text()[-2000:]}")
        return "\n".join(texts)

    def close(self) -> None:
        """End everything that still runs."""
        for process in reversed(self.started):
            if process.poll() is None:
                process.terminate()
        for process in self.started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
