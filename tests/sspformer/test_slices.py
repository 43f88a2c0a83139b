"""Volume to slices and back: values, places, and the trap of a grid that is shifted by a fraction of a pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sspformer.data.slices import LARGEST_PX, SliceGeometry, _spread, cut_slices, head_mask
from sspformer.data.volume import Volume
from tests.phantom import head_array


def volume_of(data: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 5.0)) -> Volume:
    affine = np.diag([*spacing, 1.0])
    return Volume(np.ascontiguousarray(data, dtype=np.float32), affine, spacing, affine, data.shape)


def smooth(shape: tuple[int, int], seed: int = 0, blur: float = 4.0) -> np.ndarray:
    image = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), blur)
    return (image / image.std()).astype(np.float32)


def shift_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Least-squares displacement of b against a, in pixels, to first order."""
    gradient = np.stack([g.ravel() for g in np.gradient(a)], axis=1)
    return np.linalg.lstsq(gradient, (a - b).ravel(), rcond=None)[0]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(40, 90), columns=st.integers(40, 90), start=st.tuples(st.integers(-20, 20), st.integers(-20, 20))
)
def test_a_crop_is_exact_there_and_back(rows, columns, start):
    image = np.random.default_rng(rows * columns).random((rows, columns)).astype(np.float32)
    geometry = SliceGeometry(2, (float(start[0]), float(start[1])), (1.0, 1.0), 64)
    back, covered = geometry.backward(geometry.forward(image), image.shape)
    inside = np.zeros(image.shape, bool)
    inside[max(0, start[0]) : max(0, start[0] + 64), max(0, start[1]) : max(0, start[1] + 64)] = True
    assert np.array_equal(covered, inside)
    assert np.array_equal(back[covered], image[covered])


@pytest.mark.parametrize("step", [(0.5, 0.5), (0.73, 1.1), (1.31, 1.31), (1.9, 0.8)])
def test_resampling_there_and_back_is_close_and_not_shifted(step):
    image = smooth((90, 90))
    geometry = SliceGeometry(2, (3.3, 2.1), step, 64)
    back, covered = geometry.backward(geometry.forward(image), image.shape)
    box = np.ix_(np.flatnonzero(covered.any(axis=1))[4:-4], np.flatnonzero(covered.any(axis=0))[4:-4])
    assert np.sqrt(np.mean((back[box] - image[box]) ** 2)) < 0.09 * image[box].std()
    assert np.abs(shift_between(image[box], back[box])).max() < 0.03


def test_the_grid_trap_is_caught():
    """A base made on a grid that is half a pixel off (align_corners=False against pixel centres) would be seen here."""
    image = smooth((90, 90))
    geometry = SliceGeometry(2, (3.3, 2.1), (1.31, 1.31), 64)
    trap = replace(geometry, start=(3.3 + 0.5 * 0.31, 2.1 + 0.5 * 0.31))  # where corners are aligned, not centres
    back, covered = geometry.backward(trap.forward(image), image.shape)
    box = np.ix_(np.flatnonzero(covered.any(axis=1))[4:-4], np.flatnonzero(covered.any(axis=0))[4:-4])
    assert np.abs(shift_between(image[box], back[box])).max() > 0.1
    half = np.asarray(ndimage.shift(image, (0.5, 0.5), order=1))
    assert shift_between(image[8:-8, 8:-8], half[8:-8, 8:-8]) == pytest.approx([0.5, 0.5], abs=0.1)


def test_a_point_lands_where_the_geometry_says():
    image = np.zeros((40, 40), np.float32)
    image[20, 11] = 1.0
    geometry = SliceGeometry(2, (4.0, 3.0), (0.5, 0.5), 64)
    assert np.unravel_index(geometry.forward(image).argmax(), (64, 64)) == (32, 16)  # (20 - 4) / .5, (11 - 3) / .5


def test_a_square_head_that_fits_is_cropped_not_resampled():
    stack = cut_slices(volume_of(head_array(shape=(56, 60, 4)), (3, 3, 6)), 64)
    assert stack.geometry.step == (1.0, 1.0)
    assert all(start == int(start) for start in stack.geometry.start)


def test_slices_are_normalised_by_this_volume_alone():
    data = head_array(shape=(56, 60, 4)).astype(np.float32)
    stack = cut_slices(volume_of(data, (3, 3, 6)), 64)
    assert stack.images.dtype == np.float32
    assert stack.images.min() == 0.0
    assert stack.images.max() == 1.0
    assert stack.scale == pytest.approx(np.percentile(data[head_mask(data, 2)], 99.5))
    brighter = cut_slices(volume_of(data * 7, (3, 3, 6)), 64)
    np.testing.assert_allclose(brighter.images, stack.images, atol=1e-5)
    assert np.array_equal(brighter.head, stack.head)


@pytest.mark.parametrize("offset", [0.0, -100.0, 50.0])
def test_values_stay_in_the_unit_interval_whatever_the_file_holds(offset):
    data = head_array().astype(np.float32) + offset
    stack = cut_slices(volume_of(data, (3, 3, 6)), 64)
    assert np.isfinite(stack.images).all()
    assert stack.images.min() >= 0
    assert stack.images.max() <= 1
    assert stack.head.mean() > 0.3


@pytest.mark.parametrize("offset", [-100.0, -600.0, -5000.0])
def test_a_negative_intercept_changes_no_image(offset):
    """A file that stores air as a negative number: the slices are those of the same scan without the offset."""
    data = head_array().astype(np.float32)
    plain, moved = (cut_slices(volume_of(d, (3, 3, 6)), 64) for d in (data, data + offset))
    np.testing.assert_allclose(moved.images, plain.images, atol=1e-3)
    assert moved.floor == pytest.approx(offset)
    assert plain.floor == 0.0


def test_the_skull_does_not_cut_the_brain_out_of_the_mask():
    data = head_array(shape=(80, 84, 4)).astype(np.float32)
    mask = head_mask(data, 2)
    assert mask[40, 42].all()  # brain, inside a dark skull
    assert not mask[0, 0].any()
    ring = (data[:, :, 1] < 150) & mask[:, :, 1]
    assert ring.sum() > 100  # the skull itself counts as head


def test_voxels_that_are_not_square_come_out_square():
    """A disc stays a disc: 1.0 x 2.0 mm voxels."""
    x, y = np.indices((96, 48))
    disc = np.where(np.hypot(x - 48, (y - 24) * 2) < 36, 100.0, 0.0)
    disc += np.random.default_rng(0).random(disc.shape) * (disc > 0) * 20
    stack = cut_slices(volume_of(np.repeat(disc[..., None], 3, axis=2), (1.0, 2.0, 6.0)), 64)
    spread = [np.ptp(np.flatnonzero(stack.head[1].any(axis=a))) for a in (0, 1)]
    assert abs(spread[0] - spread[1]) <= 2
    assert stack.geometry.step[0] == pytest.approx(2 * stack.geometry.step[1])
    tall = cut_slices(
        volume_of(np.repeat(disc[..., None], 3, axis=2), (1.0, 1.0, 6.0)), 64
    )  # the mutant: spacing ignored
    spread = [np.ptp(np.flatnonzero(tall.head[1].any(axis=a))) for a in (0, 1)]
    assert abs(spread[0] - spread[1]) > 10


def test_keep_pixels_grows_the_grid_rather_than_resample():
    data = head_array(shape=(150, 140, 3))
    kept = cut_slices(volume_of(data), 64, keep_pixels=True)
    assert kept.geometry.step == (1.0, 1.0)
    assert kept.images.shape[1] % 16 == 0
    assert 140 <= kept.images.shape[1] <= LARGEST_PX
    assert cut_slices(volume_of(data), 64).geometry.step != (1.0, 1.0)


def test_a_slice_beyond_the_largest_grid_is_resampled():
    x, y = np.indices((620, 640))
    data = np.where(np.hypot(x - 310, y - 320) < 300, 100.0, 0.0) + np.random.default_rng(0).random((620, 640))
    stack = cut_slices(volume_of(data[..., None], (0.4, 0.4, 5.0)), 64, keep_pixels=True)
    assert stack.images.shape[1:] == (64, 64)
    assert stack.geometry.step[0] > 1


def test_slices_are_spread_over_the_head_and_air_is_left_out():
    data = np.concatenate([np.zeros((56, 60, 6)), head_array(shape=(56, 60, 12)), np.zeros((56, 60, 6))], axis=2)
    data += np.random.default_rng(0).random(data.shape) * 5
    stack = cut_slices(volume_of(data, (3, 3, 6)), 64, max_slices=4)
    assert len(stack.indices) == 4
    assert list(stack.indices) == sorted(set(stack.indices))
    assert stack.indices[0] >= 6
    assert stack.indices[-1] < 18
    assert len(cut_slices(volume_of(data, (3, 3, 6)), 64).indices) == 24  # without a limit every slice is there
    assert len(cut_slices(volume_of(head_array(shape=(56, 60, 2)), (3, 3, 6)), 64, max_slices=6).indices) == 2


@pytest.mark.parametrize("at_most", range(1, 8))
@pytest.mark.parametrize("count", range(0, 30))
def test_no_slice_is_lost_to_rounding(count, at_most):
    picks = _spread(count, at_most)
    assert len(set(picks)) == len(picks) == min(count, at_most)
    assert all(0 <= pick < count for pick in picks)


def test_slices_of_a_sagittal_scan():
    data = np.moveaxis(head_array(shape=(56, 60, 5)), 2, 0)
    stack = cut_slices(volume_of(data, (6, 3, 3)), 64)
    assert stack.geometry.axis == 0
    axial = cut_slices(volume_of(head_array(shape=(56, 60, 5)), (3, 3, 6)), 64)
    assert np.array_equal(stack.images, axial.images)
