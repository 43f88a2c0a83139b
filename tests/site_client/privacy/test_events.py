"""Privacy events on disk: the order of states, the budget, damage of every kind, and death at any moment."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from site_client.policy import Policy
from site_client.privacy import accounting
from site_client.privacy import events as events_module
from site_client.privacy.events import Events
from sspformer.contract.errors import Code, Refused
from sspformer.contract.privacy import MechanismEvent

ROUND = MechanismEvent(sample_rate=0.2, noise_multiplier=1.31, steps=5, clipping_norm=0.5)
UNLIMITED = Policy(max_epsilon=None, require_dp=False)


@pytest.fixture
def events(tmp_path: Path) -> Events:
    return Events(tmp_path / "privacy")


@pytest.fixture
def log(events: Events, tmp_path: Path) -> Path:
    """Two spent rounds and one that started: eight lines."""
    for number in (1, 2):
        reservation = events.reserve("run", number, ROUND, UNLIMITED)
        reservation.start()
        reservation.spend()
    events.reserve("run", 3, ROUND, UNLIMITED).start()
    return tmp_path / "privacy" / "events.jsonl"


def damage_of(events: Events) -> Code | None:
    try:
        events.charged()
    except Refused as refusal:
        return refusal.code
    return None


# --- the order of states


def test_only_what_started_is_charged(events):
    reservation = events.reserve("run", 1, ROUND, UNLIMITED)
    assert events.charged() == []
    assert events.outstanding() == [ROUND]
    reservation.start()
    assert events.charged() == [ROUND]
    assert events.outstanding() == []
    reservation.spend()
    assert events.charged() == [ROUND]
    assert events.epsilon_spent(1e-5) == accounting.epsilon([ROUND], 1e-5)


def test_a_released_reservation_costs_nothing(events):
    events.reserve("run", 1, ROUND, UNLIMITED).release()
    assert events.charged() == events.outstanding() == []
    assert events.epsilon_spent(1e-5) == 0.0


@pytest.mark.parametrize(
    ("done", "then"),
    [
        ((), "spend"),
        (("start",), "start"),
        (("start",), "release"),
        (("start", "spend"), "release"),
        (("start", "spend"), "spend"),
        (("start", "spend"), "start"),
        (("release",), "start"),
        (("release",), "spend"),
        (("release",), "release"),
    ],
)
def test_states_only_go_forward(events, done, then):
    reservation = events.reserve("run", 1, ROUND, UNLIMITED)
    for step in done:
        getattr(reservation, step)()
    before = events.charged()
    with pytest.raises(Refused) as refusal:
        getattr(reservation, then)()
    assert refusal.value.code is Code.STATE
    assert events.charged() == before


def test_a_crash_after_start_counts_and_the_same_round_is_charged_again(events, tmp_path):
    events.reserve("run", 1, ROUND, UNLIMITED).start()
    again = Events(tmp_path / "privacy")  # the process came back
    assert again.release_never_started() == 0
    again.reserve("run", 1, ROUND, UNLIMITED).start()
    assert again.charged() == [ROUND, ROUND]


def test_what_never_started_is_released_when_the_round_is_reserved_anew(events):
    stale = events.reserve("run", 1, ROUND, UNLIMITED)
    other = events.reserve("run", 2, ROUND, UNLIMITED)
    events.reserve("run", 1, ROUND, UNLIMITED)
    assert events.outstanding() == [ROUND, ROUND]
    other.start()
    with pytest.raises(Refused):
        stale.start()  # its process lived after all: it may not train
    assert events.release_never_started() == 1
    assert events.charged() == [ROUND]


# --- the budget


def test_over_budget_is_refused_before_anything_is_read(events):
    caps = Policy(max_epsilon=8.0)
    for number in range(1, 16):
        reservation = events.reserve("run", number, ROUND, caps)
        reservation.start()
        reservation.spend()
    assert events.epsilon_spent(1e-5) <= 8.0
    with pytest.raises(Refused) as refusal:
        events.reserve("run", 16, ROUND, caps)
    assert refusal.value.code is Code.BUDGET
    assert events.outstanding() == []
    assert len(events.charged()) == 15
    events.reserve("next", 1, ROUND, Policy(max_epsilon=9.0))  # the site raised its budget


def test_outstanding_reservations_hold_the_budget(events):
    caps = Policy(max_epsilon=accounting.epsilon([ROUND] * 2, 1e-5))
    first = events.reserve("run", 1, ROUND, caps)
    events.reserve("run", 2, ROUND, caps)
    with pytest.raises(Refused) as refusal:
        events.reserve("run", 3, ROUND, caps)
    assert refusal.value.code is Code.BUDGET
    first.release()
    events.reserve("run", 3, ROUND, caps)


def test_the_budget_is_the_sites_over_all_runs(events):
    caps = Policy(max_epsilon=accounting.epsilon([ROUND], 1e-5) + 1e-3)
    events.reserve("one", 1, ROUND, caps).start()
    with pytest.raises(Refused):
        events.reserve("two", 1, ROUND, caps)


def test_one_runs_epsilon_can_be_told_without_the_total(events):
    events.reserve("one", 1, ROUND, UNLIMITED).start()
    events.reserve("two", 1, ROUND, UNLIMITED).start()
    assert events.charged("one") == [ROUND]
    assert events.epsilon_spent(1e-5, run="one") == accounting.epsilon([ROUND], 1e-5) < events.epsilon_spent(1e-5)
    assert events.charged("none") == []


# --- files


def test_files_are_private_and_durable(events, log, monkeypatch):
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o777 == 0o700
    assert (log.parent / "head.json").stat().st_mode & 0o777 == 0o600
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def recorder(descriptor: int) -> None:
        real(descriptor)
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", recorder)
    events.reserve("run", 4, ROUND, UNLIMITED).start()
    assert (str(log), log.stat().st_size) in synced  # the last byte was on disk before start() returned
    assert str(log.parent) in [path for path, _ in synced]


def test_a_new_log_has_its_folder_entry_flushed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(events_module, "sync_folder", synced.append)
    Events(tmp_path / "new").reserve("run", 1, ROUND, UNLIMITED)
    assert synced == [tmp_path / "new"]


def test_each_line_is_json_and_no_epsilon_is_stored(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["RESERVED", "STARTED", "SPENT"] * 2 + ["RESERVED", "STARTED"]
    assert [line["seq"] for line in lines] == list(range(1, 9))
    assert all(a["hash"] == b["previous"] for a, b in pairwise(lines))
    assert "epsilon" not in log.read_text()


def test_a_disk_that_cannot_be_written_is_a_refusal(events, log, monkeypatch):
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    reservation = events.reserve("run", 4, ROUND, UNLIMITED)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Refused) as refusal:
        reservation.start()
    assert refusal.value.code is Code.STATE
    assert "No space left" in str(refusal.value)


def test_a_lock_held_elsewhere_is_waited_for_and_then_refused(events, log, monkeypatch):
    import fcntl

    monkeypatch.setattr(events_module, "_LOCK_WAIT_S", 0.05)
    with (log.parent / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert damage_of(events) is Code.STATE
    assert damage_of(events) is None


# --- damage


def test_every_flipped_byte_is_detected(events, log):
    content = log.read_bytes()
    rng = random.Random(3)
    for position in [*rng.sample(range(len(content)), 150), len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(7)
        log.write_bytes(damaged)
        assert damage_of(events) is Code.STATE, position
        assert log.read_bytes() == damaged  # left as it is: it is evidence
    log.write_bytes(content)
    assert damage_of(events) is None


@pytest.mark.parametrize("line", range(8))
def test_a_deleted_line_is_detected(events, log, line):
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:line] + lines[line + 1 :]))
    assert damage_of(events) is Code.STATE


@pytest.mark.parametrize("line", range(7))
def test_swapped_lines_are_detected(events, log, line):
    lines = log.read_bytes().splitlines(keepends=True)
    lines[line], lines[line + 1] = lines[line + 1], lines[line]
    log.write_bytes(b"".join(lines))
    assert damage_of(events) is Code.STATE


def test_a_repeated_or_foreign_line_is_detected(events, log, tmp_path):
    lines = log.read_bytes().splitlines(keepends=True)
    Events(tmp_path / "other").reserve("run", 4, ROUND, UNLIMITED)
    foreign = (tmp_path / "other" / "events.jsonl").read_bytes()
    for extra in (lines[-1], foreign, b"\n", b"{}\n", b"null\n", b"[" * 5000 + b"\n", b"\xff\n"):
        log.write_bytes(b"".join(lines) + extra)
        assert damage_of(events) is Code.STATE


def test_lost_files_are_detected(events, log):
    head = log.parent / "head.json"
    content, head_content = log.read_bytes(), head.read_bytes()
    for name, left in ((log, None), (log, b""), (head, None), (head, b"{}"), (head, b"not json"), (head, b"[]")):
        name.unlink() if left is None else name.write_bytes(left)
        assert damage_of(events) is Code.STATE, (name, left)
        log.write_bytes(content)
        head.write_bytes(head_content)
    assert damage_of(events) is None


def test_an_older_copy_of_the_log_is_detected(events, log):
    older = log.read_bytes()
    events.reserve("run", 4, ROUND, UNLIMITED).start()
    log.write_bytes(older)
    assert damage_of(events) is Code.STATE


def test_a_torn_last_write_is_ignored_and_cut_off_by_the_next_writer(events, log):
    whole = log.read_bytes()
    for tail in (b"{", b'{"at":"2026-01-01T00:00:00+00:00","ha', b"\0" * 40):
        before = events.charged()
        log.write_bytes(log.read_bytes() + tail)
        assert events.charged() == before  # its writer never returned: nobody acted on it
        reservation = events.reserve("run", 9, ROUND, UNLIMITED)
        torn = [json.loads(line) for line in log.read_bytes().splitlines() if b'"TORN"' in line]
        assert torn[-1]["note"].startswith(f"{len(tail)} bytes, sha256:")
        reservation.release()
    assert log.read_bytes().startswith(whole)
    assert damage_of(events) is None


def test_a_torn_line_that_had_been_durable_is_damage(events, log):
    """Otherwise a bit of luck with an editor would forget an epsilon."""
    content = log.read_bytes()
    for cut in (1, 2, 50):
        log.write_bytes(content[:-cut])
        assert damage_of(events) is Code.STATE


def test_a_crash_between_the_line_and_the_head_is_no_damage(events, log):
    head = log.parent / "head.json"
    older = head.read_bytes()
    events.reserve("run", 4, ROUND, UNLIMITED)
    head.write_bytes(older)  # as if the process died right after the line was flushed
    assert damage_of(events) is None
    assert events.outstanding() == [ROUND]


# --- death

WORKER = """
import sys, time
from pathlib import Path
from site_client.policy import Policy
from site_client.privacy.events import Events
from sspformer.contract.privacy import MechanismEvent

folder, start_first = Path(sys.argv[1]), sys.argv[2] == "start-first"
events = Events(folder / "privacy")
event = MechanismEvent(sample_rate=0.2, noise_multiplier=1.31, steps=5, clipping_norm=0.5)
caps = Policy(max_epsilon=None, require_dp=False)
print("ready", flush=True)
for number in range(100000):
    reservation = events.reserve("run", number, event, caps)
    if start_first:
        reservation.start()
    (folder / "trained" / reservation.id).touch()  # reads a patient
    time.sleep(0.002)
    if not start_first:
        reservation.start()
    reservation.spend()
"""


def kill_at_a_random_moment(folder: Path, order: str, rng: random.Random) -> None:
    (folder / "trained").mkdir(exist_ok=True)
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(folder), order], stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.005, 0.2))
    finally:
        worker.kill()
        worker.communicate()


def trained_without_a_charge(folder: Path) -> set[str]:
    lines = [json.loads(line) for line in (folder / "privacy" / "events.jsonl").read_bytes().splitlines()]
    started = {line["reservation"] for line in lines if line["kind"] == "STARTED"}
    return {path.name for path in (folder / "trained").iterdir()} - started


def test_kill_at_any_moment_forgets_no_epsilon(tmp_path):
    rng = random.Random(11)
    charged = 0
    for _ in range(8):
        kill_at_a_random_moment(tmp_path, "start-first", rng)
        events = Events(tmp_path / "privacy")
        now = len(events.charged())  # and the log reads: no damage
        assert now >= charged
        assert now >= len(list((tmp_path / "trained").iterdir()))
        charged = now
    events.release_never_started()
    assert trained_without_a_charge(tmp_path) == set()
    assert charged > 0


def test_mutant_that_trains_before_it_starts_is_caught_by_the_kill_test(tmp_path):
    rng = random.Random(11)
    for _ in range(12):
        kill_at_a_random_moment(tmp_path, "train-first", rng)
        if trained_without_a_charge(tmp_path):
            return
    pytest.fail("the kill test cannot fail")


def test_two_processes_share_one_budget(tmp_path):
    """Both reserve as fast as they can; the budget holds ten rounds between them."""
    caps = accounting._rdp_epsilon(accounting._grouped([ROUND] * 10), 1e-5) + 1e-6
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from site_client.policy import Policy\n"
        "from site_client.privacy import accounting\n"
        "from site_client.privacy.events import Events\n"
        "from sspformer.contract.errors import Refused\n"
        "from sspformer.contract.privacy import MechanismEvent\n"
        "accounting._prv_epsilon = lambda *args, **kwargs: None\n"  # RDP alone: this is about the lock
        "e = MechanismEvent(sample_rate=0.2, noise_multiplier=1.31, steps=5, clipping_norm=0.5)\n"
        "try:\n"
        "    for n in range(100):\n"
        f"        Events(Path(sys.argv[1])).reserve(sys.argv[2], n, e, Policy(max_epsilon={caps!r})).start()\n"
        "except Refused as refusal:\n"
        "    sys.exit(0 if refusal.code == 'E-BUDGET' else 1)\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "privacy"), name]) for name in "ab"]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert len(Events(tmp_path / "privacy").charged()) == 10


# --- mutants: without the rule, the check above finds nothing


def test_mutant_without_the_hash_does_not_see_an_edit(events, log, monkeypatch):
    content = log.read_bytes()
    assert content.count(b'"steps":5') == 3
    log.write_bytes(content.replace(b'"steps":5', b'"steps":1', 1))
    assert damage_of(events) is Code.STATE
    monkeypatch.setattr(events_module._Line, "expected_hash", lambda line: line.hash)
    assert damage_of(events) is None


def test_mutant_without_the_head_does_not_see_a_cut(events, log, monkeypatch):
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]))
    assert damage_of(events) is Code.STATE
    monkeypatch.setattr(Events, "_check_head", lambda *args: None)
    assert damage_of(events) is None
    assert events.charged() == [ROUND]  # two rounds forgotten


def test_mutant_without_the_order_of_states_forgets_an_epsilon(events, log, monkeypatch):
    started = events.reserve("run", 4, ROUND, UNLIMITED)
    started.start()
    with pytest.raises(Refused):
        started.release()
    monkeypatch.setattr(
        events_module, "_NEXT", dict.fromkeys([None, *events_module.Kind], frozenset(events_module.Kind))
    )
    started.release()
    assert len(events.charged()) == 3  # of four


def test_mutant_without_the_gate_overspends(events, monkeypatch):
    monkeypatch.setattr(accounting, "within", lambda *args: True)
    for number in range(3):
        events.reserve("run", number, ROUND, Policy(max_epsilon=2.5)).start()
    assert events.epsilon_spent(1e-5) > 2.5
