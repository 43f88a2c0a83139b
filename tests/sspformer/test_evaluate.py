"""Scores: against numbers computed by hand, and in an order that makes sense on a real scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sspformer.contract.errors import Code, Refused
from sspformer.data.cohort import Cohort, open_cohort
from sspformer.data.slices import cut_slices
from sspformer.data.volume import read_volume
from sspformer.evaluate import METRICS, evaluate, named_paths
from sspformer.model.assembly import Head
from sspformer.tasks.denoise import OUTSIDE_WEIGHT, Denoise, non_local_means, scores
from tests.phantom import MINI, write_dataset


def test_psnr_by_hand():
    """Two slices, one with error 0.1 on half of its head, one without: errors are pooled before the logarithm."""
    target = np.full((2, 16, 16), 0.5, np.float32)
    output, inside = target.copy(), np.zeros((2, 16, 16), bool)
    inside[:, 4:12, 4:12] = True
    output[0, 4:8, 4:12] += 0.1
    got = scores(output, target, inside)
    assert got["psnr"] == pytest.approx(-10 * np.log10(0.01 * 32 / 128), abs=1e-4)
    assert got["psnr_whole"] == pytest.approx(-10 * np.log10(0.01 * 32 / 512), abs=1e-4)
    per_slice = np.mean([-10 * np.log10(0.01 / 2), 120])
    assert abs(got["psnr"] - per_slice) > 10  # the mutant: a mean of logarithms hides a bad slice


def test_perfect_output_and_clipping():
    target = np.random.default_rng(0).random((1, 32, 32)).astype(np.float32)
    inside = np.ones((1, 32, 32), bool)
    assert scores(target, target, inside)["ssim"] == pytest.approx(1)
    assert scores(target, target, inside)["psnr"] == pytest.approx(120)
    bright = np.ones((1, 32, 32), np.float32)
    assert scores(bright * 5, bright, inside)["psnr"] == pytest.approx(120)  # beyond [0, 1] nothing is shown


def test_rician_noise_has_the_moments_it_should():
    noisy = Denoise(0.1).degrade(np.zeros((4, 128, 128), np.float32), 7)
    assert noisy.mean() == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.01)  # Rayleigh in air
    bright = Denoise(0.1).degrade(np.full((4, 128, 128), 0.8, np.float32), 7)
    assert bright.std() == pytest.approx(0.1, rel=0.02)
    assert (bright**2).mean() == pytest.approx(0.64 + 2 * 0.01, rel=0.01)
    assert np.array_equal(noisy, Denoise(0.1).degrade(np.zeros((4, 128, 128), np.float32), 7))
    assert not np.array_equal(noisy, Denoise(0.1).degrade(np.zeros((4, 128, 128), np.float32), 8))


def test_seeds_beyond_32_bits_are_told_apart():
    zero = np.zeros((1, 8, 8), np.float32)
    assert not np.array_equal(Denoise(0.1).degrade(zero, 5), Denoise(0.1).degrade(zero, 5 + 2**32))


def test_loss_by_hand():
    output, target = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 2.0]]]])
    inside = torch.tensor([[[[True, False]]]])
    expected = (1 * 1 + OUTSIDE_WEIGHT * 4) / (1 + OUTSIDE_WEIGHT)
    assert Denoise(0.1).loss(output, target, inside).item() == pytest.approx(expected)


def test_non_local_means_beats_the_input_on_a_phantom(cohort):
    found = evaluate(cohort, Denoise(0.1), {})
    assert found.mean("nlm", "psnr") > found.mean("input", "psnr") + 1


def test_non_local_means_beats_the_input_on_a_real_slab(shared_data):
    path = sorted((shared_data / "hospital-a").glob("sub-*/anat/*_T1w.nii.gz"))[0]
    stack = cut_slices(read_volume(path), 224, 2)
    base = Denoise(0.1).degrade(stack.images, 3)
    plain, smooth = (scores(o, stack.images, stack.head)["psnr"] for o in (base, non_local_means(base, 0.1)))
    assert smooth > plain + 3


def test_an_untrained_head_scores_as_the_input(cohort):
    found = evaluate(cohort, Denoise(0.1), {"new": Head(MINI).eval()})
    for metric in METRICS:
        assert len(found.scores["new"][metric]) == len(cohort.test)
        assert found.mean("new", metric) == pytest.approx(found.mean("input", metric), abs=1e-4)
    assert set(found.scores) == {"input", "nlm", "new"}
    assert set(found.pictures) == {"target", "input", "nlm", "new"}
    assert all(p.shape == (64, 64) and 0 <= p.min() <= p.max() <= 1 for p in found.pictures.values())


def test_only_held_out_patients_are_read(cohort, monkeypatch):
    seen: list[str] = []
    real = Cohort.examples
    monkeypatch.setattr(Cohort, "examples", lambda self, subject: seen.append(subject) or real(self, subject))
    evaluate(cohort, Denoise(0.1), {}, baselines=True)
    assert seen == cohort.test


def test_nobody_held_out_is_one_line(tmp_path, make_cache):
    cohort = open_cohort(write_dataset(tmp_path / "data", 1), ("T1w",), make_cache())
    with pytest.raises(Refused) as caught:
        evaluate(cohort, Denoise(0.1), {})
    assert caught.value.code is Code.COHORT


def test_named_paths():
    assert {n: str(p) for n, p in named_paths(["a=x, y", "b=y/z"]).items()} == {"a": "x, y", "b": "y/z"}
    assert named_paths([]) == {}
    for wrong in ("a", "=x", "a=", "input=x", "nlm=x", "warm=x", "target=x"):
        with pytest.raises(Refused) as caught:
            named_paths([wrong])
        assert caught.value.code is Code.CONFIG
    with pytest.raises(Refused):
        named_paths(["a=x", "a=y"])
