"""Whole or absent."""

from __future__ import annotations

import os
import stat

import pytest

from sspformer.contract import durable
from sspformer.contract.errors import Code, Refused


def test_a_file_is_replaced_whole_with_its_mode(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    old = os.umask(0o077)
    try:
        durable.write_file(path, b"new")
    finally:
        os.umask(old)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_bytes(tmp_path, monkeypatch, moment):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, crash)
    with pytest.raises(KeyboardInterrupt):
        durable.write_secret(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_secret_is_never_open_to_others_not_even_for_a_moment(tmp_path, monkeypatch):
    modes = []
    original = os.replace

    def spy(source, target):
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        original(source, target)

    monkeypatch.setattr(os, "replace", spy)
    durable.write_secret(tmp_path / "s", b"secret")
    assert modes == [0o600]
    assert durable.read_secret(tmp_path / "s", "the secret") == b"secret"


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o666])
def test_a_secret_open_to_others_is_refused(tmp_path, mode):
    durable.write_secret(tmp_path / "s", b"secret")
    (tmp_path / "s").chmod(mode)
    with pytest.raises(Refused) as refusal:
        durable.read_secret(tmp_path / "s", "the secret")
    assert refusal.value.code == Code.STATE


def test_a_private_folder_is_private(tmp_path):
    durable.make_private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_a_folder_that_was_there_keeps_its_mode(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o775)
    durable.make_private_folder(shared)
    durable.make_private_folder(shared / "own")
    assert stat.S_IMODE(shared.stat().st_mode) == 0o775
    assert stat.S_IMODE((shared / "own").stat().st_mode) == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        durable.make_private_folder(tmp_path / "file")
