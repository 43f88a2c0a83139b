"""A run's folder: whole or absent, read back or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from central.store import RoundRecord, RunStore, head_shapes, write_head
from sspformer.contract.errors import Code, Refused
from sspformer.contract.tensors import Delta, digest_tensors

SHAPES = {"a": (2, 3), "b": ()}


def delta(number: int) -> Delta:
    return {"a": np.full((2, 3), number, np.float32), "b": np.asarray(-number, np.float32)}


def record(number: int) -> RoundRecord:
    return RoundRecord(
        round=number,
        sites=("alpha", "bravo"),
        missing={"charlie": "late"},
        seconds=1.5,
        bytes_up={"alpha": 10},
        bytes_down={"alpha": 20},
        update_norm=0.5,
        head=digest_tensors(delta(number)),
        ended_at=1.0,
        metrics={"alpha": {"steps": 2.0}},
    )


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path / "runs" / "one", b"sealed")


def test_a_checkpoint_is_read_back_bit_for_bit(store: RunStore) -> None:
    store.commit(record(1), delta(1), {})
    store.commit(record(2), delta(2), {"m/a": np.ones((2, 3), np.float32)})
    checkpoint = store.latest(SHAPES, stateful=True)
    assert checkpoint is not None
    assert checkpoint.round == 2
    assert all(checkpoint.delta[n].tobytes() == v.tobytes() for n, v in delta(2).items())
    assert list(checkpoint.state) == ["m/a"]
    assert list(store.records()) == [record(1), record(2)]


def test_an_empty_run_has_no_checkpoint(store: RunStore) -> None:
    assert store.latest(SHAPES) is None
    assert store.last_round() == 0
    assert store.status() == {"state": "new"}


def test_a_run_is_not_made_twice(store: RunStore) -> None:
    with pytest.raises(Refused) as refusal:
        RunStore.create(store.folder, b"other")
    assert refusal.value.code is Code.STATE
    assert "--resume one" in str(refusal.value)
    assert store.plan == b"sealed"


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="There is no run"):
        _ = RunStore(tmp_path / "nowhere").plan


def test_a_log_line_that_a_crash_swallowed_comes_back_from_the_checkpoint(store: RunStore) -> None:
    for number in (1, 2, 3):
        store.commit(record(number), delta(number), {})
    log = store.folder / "rounds.jsonl"
    log.write_text(log.read_text()[:-40])  # torn in the middle of the last line
    assert [r.round for r in store.records()] == [1, 2]
    store.latest(SHAPES)
    assert list(store.records()) == [record(1), record(2), record(3)]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other shapes", "pickle", "no record"])
def test_a_damaged_checkpoint_is_refused_and_names_the_file(store: RunStore, damage: str) -> None:
    store.commit(record(1), delta(1), {})
    path = store.checkpoint(1)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-3])
    elif damage == "flipped":
        data[-2] ^= 1
        path.write_bytes(data)
    elif damage == "other shapes":
        path.write_bytes(save({"a": np.zeros(2, np.float32)}, metadata={"record": record(1).line()}))
    elif damage == "pickle":
        path.write_bytes(b"\x80\x04.")
    else:
        path.write_bytes(save(delta(1)))
    with pytest.raises(Refused) as refusal:
        store.latest(SHAPES)
    assert refusal.value.code is Code.STATE
    assert "round-0001.safetensors" in str(refusal.value)


def test_leftovers_of_a_crash_in_the_middle_of_a_write_are_not_read(store: RunStore) -> None:
    store.commit(record(1), delta(1), {})
    (store.folder / ".round-0002.safetensors.abc.tmp").write_bytes(b"half")
    (store.folder / "round-0002.state").write_bytes(b"a state whose checkpoint never came")
    checkpoint = store.latest(SHAPES)
    assert checkpoint is not None
    assert checkpoint.round == 1


def test_the_lock_is_let_go_by_a_process_that_is_killed(store: RunStore) -> None:
    code = (
        "import sys,time; from pathlib import Path; from central.store import RunStore\n"
        "with RunStore(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(store.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert store.is_held()
        with pytest.raises(Refused, match="already running"), store.locked():
            pass
        process.kill()
    assert not store.is_held()


def test_an_exported_head_is_the_published_one_plus_the_difference(tmp_path: Path) -> None:
    published = tmp_path / "head.safetensors"
    base = {"a": np.full((2, 3), 0.5, np.float32), "b": np.asarray(2, np.float32)}
    published.write_bytes(save(base, metadata={"role": "head"}))
    assert head_shapes(published) == SHAPES
    target = tmp_path / "out.safetensors"
    write_head(published, delta(3), target)
    out = load_file(target)
    np.testing.assert_array_equal(out["a"], np.full((2, 3), 3.5, np.float32))
    assert out["b"] == -1.0
