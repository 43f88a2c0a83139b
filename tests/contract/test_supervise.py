"""A supervisor leaves no process behind, however it ends, and brings back what dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sspformer.contract import supervise
from sspformer.contract.errors import Code, Refused
from sspformer.contract.supervise import (
    Child,
    Supervisor,
    check_port_is_free,
    quiet_environment,
    wait_for_file,
    wait_for_port,
)

# A child that starts a child of its own, notes its number, and lives.
FAMILY = """
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / (sys.argv[2] + ".starts")).open("a") as log:
    log.write(f"{os.getpid()}\\n")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(folder)])
(folder / (sys.argv[2] + ".ready")).touch()
time.sleep(60)
"""
OWNER = """
import sys, pathlib
from sspformer.contract.supervise import Child, Supervisor, quiet_environment, wait_for_file
folder = pathlib.Path(sys.argv[1])
supervisor = Supervisor(folder / "logs")
command = [sys.executable, "-c", (folder / "family.py").read_text(), str(folder), "one"]
supervisor.start(Child("one", command, quiet_environment(), wait_for_file(folder / "one.ready")))
print("up", flush=True)
supervisor.run()
"""


def living(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(folder) in line and state != "Z":
                found.append(int(entry.name))
    return found


def eventually(done: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def child(folder: Path, name: str, **changes: object) -> Child:
    command = [sys.executable, "-c", FAMILY, str(folder), name]
    fields = {"name": name, "command": command, "environment": quiet_environment()}
    fields["ready"] = wait_for_file(folder / f"{name}.ready", 20)
    return Child(**(fields | changes))  # type: ignore[arg-type]


def starts(folder: Path, name: str) -> list[int]:
    return [int(line) for line in (folder / f"{name}.starts").read_text().split()]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "logs", say=lambda line: None)
    yield made
    made.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_however_the_supervisor_ends(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "family.py").write_text(FAMILY)
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        assert len(living(tmp_path)) == 3
        owner.send_signal(number)
        owner.wait(20)
    if number is signal.SIGKILL:
        # The kernel ends the children; what they started has to watch for that itself, as Flower's server app does.
        eventually(lambda: starts(tmp_path, "one")[0] not in living(tmp_path))
        for grandchild in living(tmp_path):
            os.kill(grandchild, signal.SIGKILL)
    eventually(lambda: living(tmp_path) == [])


def test_a_dead_child_comes_back_and_takes_its_companion_along(tmp_path: Path, supervisor: Supervisor) -> None:
    supervisor.start(child(tmp_path, "node"))
    supervisor.start(child(tmp_path, "worker", takes_along=("node",)))

    def act() -> None:
        os.kill(starts(tmp_path, "worker")[0], signal.SIGKILL)
        eventually(lambda: len(starts(tmp_path, "worker")) == 2 and len(starts(tmp_path, "node")) == 2)
        os.kill(starts(tmp_path, "node")[1], signal.SIGKILL)
        eventually(lambda: len(starts(tmp_path, "node")) == 3)
        supervisor.stop()

    actor = threading.Thread(target=act)
    actor.start()
    supervisor.run()
    actor.join()
    assert len(starts(tmp_path, "worker")) == 2, "the worker outlives its node"
    eventually(lambda: living(tmp_path) == [])


def test_the_pause_before_a_restart_grows(tmp_path: Path) -> None:
    lines: list[str] = []
    supervisor = Supervisor(tmp_path / "logs", say=lines.append)
    supervisor.start(child(tmp_path, "short", command=[sys.executable, "-c", "import time; time.sleep(1)"], ready=None))
    threading.Timer(6.0, supervisor.stop).start()
    supervisor.run()
    assert "in 1 s" in lines[0]
    assert "in 2 s" in lines[1]


def test_what_a_child_refuses_with_is_the_refusal_of_its_supervisor(tmp_path: Path, supervisor: Supervisor) -> None:
    code = "raise SystemExit('E-DATA: the folder is empty. Next: fill it.')"
    with pytest.raises(Refused) as refusal:
        supervisor.start(child(tmp_path, "strict", command=[sys.executable, "-c", code]))
    assert str(refusal.value) == "E-DATA: the folder is empty. Next: fill it."


@pytest.mark.parametrize(
    "code", ["raise ValueError('E-NONE: x Next: y')", "print('E-NONE: x Next: y'); exit(3)", "exit(1)"]
)
def test_a_child_that_ends_at_once_is_an_e_state_that_names_its_log(
    tmp_path: Path, supervisor: Supervisor, code: str
) -> None:
    with pytest.raises(Refused) as refusal:
        supervisor.start(child(tmp_path, "broken", command=[sys.executable, "-c", code]))
    assert refusal.value.code is Code.STATE
    assert str(tmp_path / "logs" / "broken.log") in str(refusal.value)


def test_a_child_that_never_gets_ready_is_refused(tmp_path: Path, supervisor: Supervisor) -> None:
    with pytest.raises(Refused, match="does not come up"):
        supervisor.start(child(tmp_path, "slow", ready=wait_for_port("127.0.0.1", 1, timeout_s=0.5)))


def test_logs_are_for_their_owner(tmp_path: Path, supervisor: Supervisor) -> None:
    supervisor.start(child(tmp_path, "one"))
    assert (tmp_path / "logs").stat().st_mode & 0o077 == 0
    assert (tmp_path / "logs" / "one.log").stat().st_mode & 0o077 == 0


def test_a_taken_port_is_named_with_its_key() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Refused) as refusal:
        check_port_is_free("127.0.0.1", taken.getsockname()[1], "gateway_port")
    assert refusal.value.code is Code.PORT
    assert "gateway_port" in str(refusal.value)


def test_flowers_programs_get_no_proxy_and_phone_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://proxy:3128")
    environment = quiet_environment(FLWR_HOME="/x")
    assert not [name for name in environment if name.lower().endswith("_proxy")]
    assert (environment["FLWR_TELEMETRY_ENABLED"], environment["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))


def housekeeping(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Run a supervisor whose housekeeping fails at first; give how often it was called and what was said."""
    monkeypatch.setattr(supervise, "FIRST_PAUSE_S", 0.2)
    calls: list[float] = []
    lines: list[str] = []

    def every() -> None:
        calls.append(time.monotonic())
        if len(calls) <= 2:
            raise error
        owner.stop()

    owner = Supervisor(folder / "logs", say=lines.append, every=every, _every_pause_s=0.2)
    owner.start(child(folder, "one"))
    owner.run()
    return len(calls), lines


PASSING = [
    Refused(Code.STATE, "sites.json is damaged.", "Restore it."),
    OSError(28, "No space left on device"),
    subprocess.TimeoutExpired(["flwr", "supernode"], 15.0),
]


@pytest.mark.parametrize("error", PASSING, ids=["refused", "disk", "timeout"])
def test_housekeeping_that_fails_is_said_in_one_line_and_tried_again(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, lines = housekeeping(tmp_path, error, monkeypatch)
    assert count == 3
    assert len(lines) == 2
    assert all("Trying again in" in line and "\n" not in line for line in lines)
    assert living(tmp_path) == []


def test_mutant_that_lets_housekeeping_fail_ends_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "_PASSING", ())
    with pytest.raises(OSError, match="No space"):
        housekeeping(tmp_path, PASSING[1], monkeypatch)


def test_a_child_that_cannot_be_started_again_is_tried_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    owner = Supervisor(tmp_path / "logs", say=lines.append)
    owner.start(child(tmp_path, "one"))
    launch, failures = owner._launch, [OSError(12, "Cannot allocate memory"), subprocess.SubprocessError("preexec")]

    def fail_twice(which: Child) -> subprocess.Popen[bytes]:
        if failures:
            raise failures.pop(0)
        return launch(which)

    monkeypatch.setattr(owner, "_launch", fail_twice)
    monkeypatch.setattr(supervise, "FIRST_PAUSE_S", 0.1)
    owner._running["one"].pause_s = 0.1
    os.kill(starts(tmp_path, "one")[0], signal.SIGKILL)

    def stop_when_back() -> None:
        eventually(lambda: len(starts(tmp_path, "one")) == 2)
        owner.stop()

    watcher = threading.Thread(target=stop_when_back)
    watcher.start()
    owner.run()
    watcher.join()
    assert [line for line in lines if "cannot be started" in line and "Trying again" in line] == lines[1:]
    assert len(lines) == 3


def test_a_program_that_is_not_there_is_one_refusal(tmp_path: Path, supervisor: Supervisor) -> None:
    with pytest.raises(Refused, match="cannot be started") as refusal:
        supervisor.start(child(tmp_path, "none", command=[str(tmp_path / "no-such-program")]))
    assert refusal.value.code is Code.STATE
