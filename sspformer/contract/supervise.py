"""Running a role's processes: started in order, restarted with a pause, and none left behind, however this one ends.

Both sides use it (`central serve`, `site-client start`). A child dies with its supervisor because the kernel is asked
to kill it then (PR_SET_PDEATHSIG); children of children are reached through the child's process group.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from sspformer.contract.durable import make_private_folder
from sspformer.contract.errors import Code, Refused

STOP_S = 8.0  # how long a child may take to stop before it is killed
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
STEADY_S = 60.0  # a child that lived this long starts again with the first pause
_TICK_S = 0.2
_EVERY_S = 1.0
# What a machine may do to us at any time: a full disk, a slow program, a damaged file. None of it ends a supervisor.
_PASSING = (Refused, OSError, subprocess.SubprocessError)
_REFUSAL = re.compile(r"(E-[A-Z]+): (.*) Next: (.*)")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
# A supervisor starts programs by fork. Where something has brought gRPC along, its fork handlers may abort the whole
# process ("epoll_wait error: Bad file descriptor"); nobody needs them, because every child replaces itself at once.
NO_FORK_HANDLERS = {"GRPC_ENABLE_FORK_SUPPORT": "0"}
os.environ |= NO_FORK_HANDLERS


Ready = Callable[[Callable[[], bool]], bool]


@dataclass(frozen=True)
class Child:
    """One process.

    Args:
        name: what logs and messages call it; its log is `<logs>/<name>.log`.
        command: program and arguments.
        environment: the whole environment of the process.
        ready: waits until the process can serve and says whether it can; gets a test whether it still lives.
        takes_along: children that hold state of this one and are restarted when it dies.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: Ready | None = None
    takes_along: tuple[str, ...] = ()


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    started: float
    pause_s: float = FIRST_PAUSE_S
    due: float | None = None  # when a dead child is started again


@dataclass
class Supervisor:
    """Keeps a set of children running until it is told to stop.

    Start and stop it from the main thread: the kernel ties a child's life to the thread that started it.

    Args:
        logs: folder of the children's logs (0700).
        say: where one line per event goes.
        every: called about once a second while all is quiet, for housekeeping. When it fails, one line is said and it
            is called again after a pause that grows from failure to failure.
    """

    logs: Path
    say: Callable[[str], None] = print
    every: Callable[[], None] | None = None
    _running: dict[str, _Running] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _every_due: float = 0.0
    _every_pause_s: float = FIRST_PAUSE_S

    def start(self, child: Child) -> None:
        """Start a child and wait until it is ready.

        Raises:
            Refused: what the child itself refused with; E-STATE, it ended or did not come up for another reason.
        """
        try:
            running = _Running(child, self._launch(child), time.monotonic())
        except (OSError, subprocess.SubprocessError) as error:
            raise Refused(
                Code.STATE,
                f"{child.name} cannot be started ({_reason(error)}).",
                "Check the installation and the disk.",
            ) from None
        self._running[child.name] = running
        is_ready = child.ready is None or child.ready(lambda: running.process.poll() is None)
        if running.process.poll() is not None:
            raise self._refusal(child, running.process.returncode)
        if not is_ready:
            raise Refused(Code.STATE, f"{child.name} does not come up.", self._look(child))

    def run(self) -> None:
        """Watch the children until SIGTERM, SIGINT or `stop`, then end them all, last started first."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self._stop.wait(_TICK_S):
                self._tend()
                self.keep_house()
        finally:
            self.end()
            for number, handler in before.items():
                signal.signal(number, handler)

    def keep_house(self) -> None:
        """Call `every` if it is due."""
        if self.every is None or time.monotonic() < self._every_due:
            return
        try:
            self.every()
        except _PASSING as error:
            pause_s = self._every_pause_s
            self.say(f"{_reason(error)} Trying again in {pause_s:.0f} s.")
            self._every_pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        else:
            pause_s, self._every_pause_s = _EVERY_S, FIRST_PAUSE_S
        self._every_due = time.monotonic() + pause_s

    def stop(self) -> None:
        """Ask `run` to come to its end."""
        self._stop.set()

    def end(self) -> None:
        """End every child and everything it started."""
        for running in reversed(self._running.values()):
            _end(running.process)
        self._running.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def _tend(self) -> None:
        now = time.monotonic()
        for running in list(self._running.values()):
            if running.due is None and running.process.poll() is not None:
                self._mark_dead(running, now)
                for name in running.child.takes_along:
                    companion = self._running.get(name)
                    if companion is not None and companion.due is None:
                        _end(companion.process)
                        self._mark_dead(companion, now)
            elif running.due is not None and now >= running.due:
                self._restart(running, now)

    def _restart(self, running: _Running, now: float) -> None:
        try:
            running.process, running.started, running.due = self._launch(running.child), now, None
        except _PASSING as error:
            running.due = now + running.pause_s
            self.say(
                f"{running.child.name} cannot be started: {_reason(error)} Trying again in {running.pause_s:.0f} s."
            )
            running.pause_s = min(LONGEST_PAUSE_S, 2 * running.pause_s)

    def _mark_dead(self, running: _Running, now: float) -> None:
        if now - running.started >= STEADY_S:
            running.pause_s = FIRST_PAUSE_S
        running.due = now + running.pause_s
        self.say(
            f"{running.child.name} ended; starting it again in {running.pause_s:.0f} s. {self._look(running.child)}"
        )
        running.pause_s = min(LONGEST_PAUSE_S, 2 * running.pause_s)
        _end(running.process)  # whatever it had started

    def _launch(self, child: Child) -> subprocess.Popen[bytes]:
        make_private_folder(self.logs)
        descriptor = os.open(self._log(child), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as log:
            return subprocess.Popen(
                list(child.command),
                env=dict(child.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,  # safe here: the supervisor has no threads
            )

    def _refusal(self, child: Child, status: int) -> Refused:
        """What the child said last, if that was a refusal; else that it ended."""
        *_, last = ["", *self._log(child).read_text(errors="replace").splitlines()]
        said = _REFUSAL.fullmatch(last)
        if said and said[1] in set(Code):
            return Refused(Code(said[1]), said[2], said[3])
        return Refused(Code.STATE, f"{child.name} ended at once with status {status}.", self._look(child))

    def _log(self, child: Child) -> Path:
        return self.logs / f"{child.name}.log"

    def _look(self, child: Child) -> str:
        return f"Read {self._log(child)}"


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def wait_for_port(host: str, port: int, timeout_s: float = 90.0) -> Ready:
    """A `ready` that waits until something listens on the port, the child has died, or the time is over."""

    def ready(is_alive: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + timeout_s
        while is_alive() and time.monotonic() < deadline:
            with socket.socket() as probe:
                probe.settimeout(0.5)
                if probe.connect_ex((host, port)) == 0:
                    return True
            time.sleep(0.1)
        return False

    return ready


def wait_for_file(path: Path, timeout_s: float = 180.0) -> Ready:
    """A `ready` that waits until the file is there, the child has died, or the time is over."""

    def ready(is_alive: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + timeout_s
        while is_alive() and time.monotonic() < deadline:
            if path.exists():
                return True
            time.sleep(0.1)
        return False

    return ready


def check_port_is_free(host: str, port: int, key: str) -> None:
    """Refuse early and in plain words when a port is taken.

    Args:
        host: address to bind.
        port: the port.
        key: the configuration key that names the port.

    Raises:
        Refused: E-PORT.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Refused(
                Code.PORT,
                f"Port {port} on {host} cannot be used ({error.strerror}).",
                f"Stop what uses it, or change '{key}' in the configuration.",
            ) from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def quiet_environment(**extra: str) -> dict[str, str]:
    """This process's environment for Flower's programs: no telemetry, no update check, no proxy, our programs first.

    A proxy would carry calls that are meant for one known host. Flower's programs find each other by PATH.
    """
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    quiet = NO_FORK_HANDLERS | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return kept | {"PATH": path} | quiet | extra


def _reason(error: BaseException) -> str:
    """What went wrong, in one line. A subprocess's command line is left out: it says nothing to the reader."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"A program took longer than {error.timeout:.0f} s."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'The system'}: {error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to stop, then make it."""
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
