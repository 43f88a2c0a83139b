"""Programs that the demo starts, and the promise that none of them outlives it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sspformer.contract.errors import Code, Refused
from sspformer.contract.supervise import quiet_environment

STOP_S = 20.0  # supervisors end their own children first, each with its own grace
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_MODULES = {"central": "central.cli", "site-client": "site_client.cli", "sspformer": "sspformer.cli"}


@dataclass
class Programs:
    """The programs of one demo. Leave it through `close`, which `running` does for you.

    Args:
        logs: folder of their logs, one file per name.
    """

    logs: Path
    _started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _others: set[psutil.Process] = field(default_factory=lambda: set(_descendants()))  # were there before us

    def start(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """Start a program in the background; its output goes to `<logs>/<name>.log`.

        Args:
            name: what messages and the log file call it.
            command: one of `central`, `site-client`, `sspformer` or any program, then its arguments.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        program, *arguments = (str(part) for part in command)
        # Our commands by module: the same installation as this process, whatever PATH says.
        ours = [sys.executable, "-m", _MODULES[program]] if program in _MODULES else [program]
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [*ours, *arguments],
                env=quiet_environment(OMP_NUM_THREADS="1"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends everything in order
                preexec_fn=_stop_with_parent,  # safe here: the demo has no threads when it starts a program
            )
        self._started[name] = process
        return process

    def wait(self, *names: str, timeout_s: float) -> None:
        """Wait until programs have ended well.

        Raises:
            Refused: one ended badly, or is still busy after `timeout_s`.
        """
        for name in names:
            process = self._started[name]
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise self._failure(name, f"is not done after {timeout_s:.0f} s") from None
            if status != 0:
                raise self._failure(name, f"ended with status {status}")
            del self._started[name]

    def run(self, name: str, *command: str | Path, timeout_s: float = 120.0) -> str:
        """Run one command to its end and return what it printed.

        Raises:
            Refused: as `wait`.
        """
        before = self.log(name).stat().st_size if self.log(name).exists() else 0
        self.start(name, *command)
        self.wait(name, timeout_s=timeout_s)
        with self.log(name).open("rb") as log:
            log.seek(before)
            return log.read().decode(errors="replace")

    def check(self) -> None:
        """See that everything in the background still runs.

        Raises:
            Refused: one has ended.
        """
        for name, process in self._started.items():
            status = process.poll()
            if status not in (None, 0):
                raise self._failure(name, f"ended with status {status}")

    def is_running(self, name: str) -> bool:
        """Whether a program that was started has not ended yet."""
        return name in self._started and self._started[name].poll() is None

    def stop(self, *names: str) -> None:
        """End programs: ask all at once, wait, then end what is left."""
        chosen = [self._started.pop(name) for name in names if name in self._started]
        for process in chosen:
            _signal(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs([p for p in map(_process, (c.pid for c in chosen)) if p], timeout=STOP_S)
        for process in alive:
            _signal(process.pid, signal.SIGKILL)
        for process in chosen:
            process.wait()

    def close(self) -> None:
        """End everything: hospitals before the coordinator, then whatever was left behind by either."""
        self.stop(*reversed(self._started))
        left = [process for process in _descendants() if process not in self._others]
        for process in left:
            _signal(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(left, timeout=5)
        for process in alive:
            _signal(process.pid, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=5)

    def log(self, name: str) -> Path:
        """Where a program's output lies."""
        return self.logs / f"{name}.log"

    def _failure(self, name: str, what: str) -> Refused:
        """Pass a program's own refusal on, or name its log."""
        lines = self.log(name).read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else ""
        for code in Code:
            if last.startswith(f"{code.value}: "):
                what_it_said, _, next_step = last.removeprefix(f"{code.value}: ").partition(" Next: ")
                return Refused(code, f"{name}: {what_it_said}", f"{next_step} Logs: {self.logs}")
        return Refused(Code.STATE, f"{name} {what}.", f"read {self.log(name)}; all logs: {self.logs}")


@contextmanager
def running(logs: Path) -> Iterator[Programs]:
    """Start programs inside; every one has ended when this returns, whether by success, refusal or Ctrl-C."""
    # Orphans of a killed supervisor come to us instead of to init, so that `close` finds them.
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    programs = Programs(logs)
    # SIGINT too: a shell that starts us in the background has it ignored, and Python then leaves it so.
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield programs
    finally:
        # A second Ctrl-C must not cut the ending short.
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        try:
            programs.close()
        finally:
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
            for number, handler in before.items():
                signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _stop_with_parent() -> None:
    """Ask the kernel to stop this program when the demo ends, however it ends; it then stops its own children."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
