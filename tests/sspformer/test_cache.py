"""The feature cache: a wrong, stale or damaged entry is never used, and an opted-out patient is gone from the disk."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from sspformer.contract.errors import Code, Refused
from sspformer.data import cache as cache_module
from sspformer.data.bids import Scan
from sspformer.data.cache import encode
from sspformer.model.assembly import CHANNELS, Head
from sspformer.tasks.denoise import restore, scores
from tests.phantom import MINI, write_scan


@pytest.fixture
def scan(tmp_path) -> Scan:
    return Scan("sub-01", "T1w", write_scan(tmp_path / "data", "sub-01", seed=5))


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """One element for each time that an encoder really ran over a scan."""
    runs: list[int] = []
    real = cache_module.encode

    def counting(*arguments):
        runs.append(1)
        return real(*arguments)

    monkeypatch.setattr(cache_module, "encode", counting)
    return runs


def test_an_entry_is_made_once_and_says_what_it_holds(make_cache, scan, made):
    cache = make_cache()
    first = cache.entry(scan, 0)
    assert cache.entry(scan, 0) == first == make_cache().entry(scan, 0)
    assert len(made) == 1
    example = cache.load(first)
    assert first.slices == 3
    assert example.features.shape == (3, MINI.grid**2, MINI.width)
    assert example.base.shape == example.target.shape == example.inside.shape == (3, 64, 64)
    assert example.features.dtype == example.base.dtype == example.target.dtype == torch.float16
    assert example.inside.dtype == torch.bool
    assert 0 <= example.target.min() <= example.target.max() <= 1
    noise = (example.base.float() - example.target.float())[example.inside & (example.target > 0.5)]
    assert noise.std() == pytest.approx(0.1, rel=0.1)


def test_the_key_changes_with_everything_that_decides_the_entry(make_cache, scan, tmp_path):
    first = make_cache().entry(scan, 0).path
    others = {
        make_cache(digest="sha256:other").entry(scan, 0).path,
        make_cache(sigma=0.11).entry(scan, 0).path,
        make_cache(size_px=80).entry(scan, 0).path,
        make_cache(max_slices=2).entry(scan, 0).path,
        make_cache().entry(scan, 1).path,
        make_cache().entry(Scan("sub-01", "T2w", scan.path), 0).path,
    }
    write_scan(tmp_path / "data", "sub-01", seed=6)  # the same name, other bytes
    others.add(make_cache().entry(scan, 0).path)
    assert len(others | {first}) == 8


def test_a_new_way_of_cutting_slices_makes_old_entries_unusable(make_cache, scan, monkeypatch):
    first = make_cache().entry(scan, 0).path
    monkeypatch.setattr(cache_module, "PREPROCESSING", "slices-next")
    assert make_cache().entry(scan, 0).path != first


def test_variants_are_other_noise_on_the_same_slices(make_cache, scan):
    cache = make_cache()
    a, b = (cache.load(cache.entry(scan, v)) for v in (0, 1))
    assert torch.equal(a.target, b.target)
    assert not torch.equal(a.base, b.base)


def test_noise_depends_on_the_image_and_not_on_the_name(make_cache, scan, tmp_path):
    cache = make_cache()
    twin = Scan("sub-77", "T1w", scan.path)
    assert torch.equal(cache.load(cache.entry(scan, 0)).base, cache.load(cache.entry(twin, 0)).base)
    other = Scan("sub-02", "T1w", write_scan(tmp_path / "data", "sub-02", seed=9))
    difference = [c.base.float() - c.target.float() for c in (cache.load(cache.entry(s, 0)) for s in (scan, other))]
    assert not torch.equal(*difference)  # no noise pattern is used twice


def damage_flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 0x10
    path.write_bytes(raw)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 500)


def damage_key(path: Path) -> None:
    """Another entry's bytes, sound in themselves, under this name."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata | {"key": "0" * 64}))


def damage_content(path: Path) -> None:
    """Other tensors under the right key, without their digest."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["features"] = tensors["features"] * 2
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


def damage_metadata(path: Path) -> None:
    path.write_bytes(safetensors.torch.save({"features": torch.zeros(3, 16, 32)}))


DAMAGES = [
    damage_flip,
    damage_truncate,
    damage_empty,
    damage_garbage,
    damage_key,
    damage_content,
    damage_metadata,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_entry_is_made_again(make_cache, scan, made, damage):
    cache = make_cache()
    entry = cache.entry(scan, 0)
    before = entry.path.read_bytes()
    damage(entry.path)
    assert entry.path.read_bytes() != before
    assert cache.entry(scan, 0) == entry
    assert len(made) == 2
    assert safetensors.torch.load(entry.path.read_bytes()).keys() == safetensors.torch.load(before).keys()
    for name, tensor in safetensors.torch.load(before).items():
        assert torch.equal(safetensors.torch.load(entry.path.read_bytes())[name], tensor)


def test_the_damage_test_would_notice_a_cache_that_does_not_check(make_cache, scan, made, monkeypatch):
    """The mutant: content digests that are all alike let a flipped byte through."""
    monkeypatch.setattr(cache_module, "_content_digest", lambda tensors: "same")
    cache = make_cache()
    damage_flip(cache.entry(scan, 0).path)
    cache.entry(scan, 0)
    assert len(made) == 1


def test_entries_are_for_the_owner_alone(make_cache, scan, tmp_path):
    path = make_cache().entry(scan, 0).path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert "sub-01" not in str(path.relative_to(tmp_path))
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written stays


def test_keep_only_and_forget_remove_patients_and_nothing_else(make_cache, scan, tmp_path):
    cache = make_cache()
    stranger = tmp_path / "cache" / "precious"  # the cache was put into a folder that holds other things
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("only copy")
    (tmp_path / "cache" / "notes.txt").write_text("also mine")
    kept = cache.entry(scan, 0)
    gone = [cache.entry(Scan(name, "T1w", scan.path), 0) for name in ("sub-02", "sub-03")]
    assert cache.keep_only({"sub-01"}) == 2
    assert kept.path.exists()
    assert not any(entry.path.parent.exists() for entry in gone)
    cache.forget({"sub-01", "sub-never"})
    assert not kept.path.parent.exists()
    assert (stranger / "thesis.txt").read_text() == "only copy"
    assert (tmp_path / "cache" / "notes.txt").exists()


def test_half_precision_features_do_not_change_the_output(make_cache, scan, mini_encoder):
    torch.manual_seed(1)
    head = Head(MINI).eval()
    torch.nn.init.normal_(head.tail.last.weight, std=0.02)
    cache = make_cache()
    example = cache.load(cache.entry(scan, 0))
    base, target, inside = example.base.float().numpy(), example.target.float().numpy(), example.inside.numpy()
    exact = encode(mini_encoder, base, "T1w")
    outputs = [restore(head, features, base) for features in (exact, exact.half())]
    psnr = [scores(output, target, inside)["psnr"] for output in outputs]
    assert psnr[0] != scores(base, target, inside)["psnr"]
    assert abs(psnr[0] - psnr[1]) < 1e-3
    coarse = exact.round()  # the mutant: whole numbers would be seen
    assert abs(scores(restore(head, coarse, base), target, inside)["psnr"] - psnr[0]) > 1e-3


@pytest.mark.parametrize(
    ("contrast", "channel"), [("T1w", 0), ("ce-T1w", 0), ("T2w", 1), ("PDw", 1), ("FLAIR", 2), ("T2starw", 5)]
)
def test_a_contrast_fills_its_own_channel(contrast, channel):
    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            filled = [i for i in range(len(CHANNELS)) if x[0, i].any()]
            return torch.tensor([[float(i) for i in filled]])

    assert encode(Spy(), np.ones((1, 16, 16), np.float32), contrast).tolist() == [[float(channel)]]  # type: ignore[arg-type]


def test_a_contrast_without_a_channel_is_refused(mini_encoder):
    with pytest.raises(Refused, match="bold"):
        encode(mini_encoder, np.ones((1, 64, 64), np.float32), "bold")


def test_a_scan_that_cannot_be_read_or_shows_no_head(make_cache, tmp_path, scan):
    link = tmp_path / "sub-09_T1w.nii.gz"
    link.symlink_to(tmp_path / "not-fetched.nii.gz")
    for path in (link, tmp_path / "gone_T1w.nii.gz", tmp_path):
        with pytest.raises(Refused, match="not usable") as caught:
            make_cache().entry(Scan("sub-09", "T1w", path), 0)
        assert caught.value.code is Code.DATA


def test_a_cache_that_cannot_be_written_says_so(make_cache, scan, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused) as caught:
        make_cache(tmp_path / "file")
    assert caught.value.code is Code.STATE

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "replace", full)
    with pytest.raises(Refused, match="No space left") as caught:
        make_cache().entry(scan, 0)
    assert caught.value.code is Code.STATE


def test_an_entry_can_move_with_its_folder(make_cache, scan, tmp_path, made):
    make_cache().entry(scan, 0)
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    make_cache(tmp_path / "moved").entry(scan, 0)
    assert len(made) == 1
