"""Files as hospitals have them: usable and the right way round, or refused with one line that names file and reason."""

from __future__ import annotations

import csv
import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sspformer.contract.errors import Code, Refused
from sspformer.data.slices import cut_slices
from sspformer.data.volume import Volume, orientation, read_volume, slice_axis
from tests.phantom import head_array, head_image

ORIENTATIONS = [
    "".join(codes)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for codes in itertools.product(*axes)
]  # fmt: skip

AWKWARD = {  # what each file of the collection is: None is usable, else a word of the reason
    "4d_pcasl_52x68x20x10.nii.gz": "dimensions",
    "4d_singleton_LPI.nii.gz": None,
    "orient_PSR_spine.nii.gz": None,
    "single_slice_192x192x1_PIR.nii.gz": None,
    "lowres_10mm_19x26x32.nii.gz": "coarse",
    "scl_slope_uint8_template.nii": None,
    "label_float64.nii.gz": "grey levels",
    "dicom_MR-SIEMENS-DICOM-WithOverlays.dcm": "NIfTI",
    "dicom_MR_small.dcm": "NIfTI",
    "nib_example_nifti2.nii.gz": "dimensions",
    "rgb_structured_dtype.nii.gz": "colours",
    "made_truncated.nii.gz": "truncated",
    "made_not_gzip.nii.gz": "NIfTI",
    "made_zero_bytes.nii.gz": "NIfTI",
    "made_phi_header_DOE_JANE.nii.gz": None,
    "made_nan_inf.nii.gz": "NaN",
    "made_int16_slope_inter.nii.gz": None,
    "made_all_zero.nii.gz": "equal",
}


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.Nifti1Image(data, np.diag([1.0, 1, 1, 1]) if affine is None else affine).to_filename(path)
    return path


def reason(path: Path) -> str:
    with pytest.raises(Refused) as caught:
        read_volume(path)
    assert caught.value.code is Code.DATA
    assert str(path) in caught.value.what
    assert caught.value.next_step
    assert "\n" not in str(caught.value)
    return caught.value.what.removeprefix(f"{path} is not usable: ")


def test_every_awkward_file_is_usable_or_refused_by_name(shared_data):
    folder = shared_data / "awkward"
    listed = [row["file"] for row in csv.DictReader((folder / "manifest.csv").open())]
    assert sorted(listed) == sorted(AWKWARD)
    for name in listed:
        expected = AWKWARD[name]
        if expected is None:
            volume = read_volume(folder / name)
            assert np.isfinite(volume.data).all()
            stack = cut_slices(volume, max_slices=3)
            assert len(stack.images) == min(3, volume.data.shape[slice_axis(volume)])
            assert stack.images.max() <= 1.0
            assert stack.images.min() >= 0.0
            assert stack.images.std() > 0.01
        else:
            assert expected in reason(folder / name), name


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_every_orientation_becomes_the_same_volume_and_goes_back_bit_for_bit(tmp_path, axes):
    original = head_image(shape=(40, 44, 4))
    image = head_image(shape=(40, 44, 4), axes=axes)
    image.to_filename(tmp_path / "x.nii.gz")
    volume = read_volume(tmp_path / "x.nii.gz")
    assert orientation(volume) == axes
    assert np.array_equal(volume.data, np.asarray(original.dataobj))
    np.testing.assert_allclose(volume.affine, original.affine, atol=1e-4)
    assert slice_axis(volume) == 2
    assert np.array_equal(volume.to_native(volume.data), np.asarray(image.dataobj))
    if axes != "RAS":  # the mutant: handing the canonical array back unchanged
        stored = np.asarray(image.dataobj)
        assert volume.data.shape != stored.shape or not np.array_equal(volume.data, stored)


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


def test_an_oblique_scan_goes_back_to_its_own_grid(tmp_path):
    turn = np.deg2rad(25)
    affine = np.diag([2.0, 2.0, 6.0, 1.0])
    affine[:2, :2] = 2 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    affine[:, 0] *= -1
    data = head_array(shape=(40, 44, 5))
    volume = read_volume(save(tmp_path / "x.nii.gz", data, affine))
    assert volume.spacing_mm == pytest.approx((2, 2, 6))
    assert np.array_equal(volume.to_native(volume.data), data)


def test_trailing_dimensions_of_one_come_back(tmp_path):
    data = head_array(shape=(40, 44, 4))[..., None, None]
    volume = read_volume(save(tmp_path / "x.nii.gz", data, np.diag([-1.0, 1, 5, 1])))
    assert volume.data.shape == (40, 44, 4)
    assert np.array_equal(volume.to_native(volume.data), data)


@pytest.mark.parametrize(
    ("shape", "spacing", "axis"),
    [
        ((256, 256, 20), (1, 1, 5), 2),
        ((20, 256, 256), (5, 1, 1), 0),
        ((256, 30, 256), (1, 4, 1), 1),
        ((176, 256, 256), (1, 1, 1), 2),  # isotropic: axial
        ((1, 192, 192), (1, 1, 1), 0),  # a single slice tells its axis by being single
        ((192, 1, 192), (1, 1, 1), 1),
        ((192, 192, 1), (1, 1, 1), 2),
        ((40, 256, 256), (1.2, 1, 1), 0),
    ],
)
def test_slice_axis(shape, spacing, axis):
    affine = np.diag([*spacing, 1.0])
    volume = Volume(np.broadcast_to(np.float32(0), shape), affine, spacing, affine, shape)
    assert slice_axis(volume) == axis


def test_scaling_of_the_header_is_applied(tmp_path):
    image = nib.Nifti1Image(head_array(), np.diag([3.0, 3, 6, 1]))
    image.header.set_slope_inter(0.5, -100)
    image.to_filename(tmp_path / "x.nii.gz")
    written = nib.load(tmp_path / "x.nii.gz").get_fdata(dtype=np.float32)
    assert np.array_equal(read_volume(tmp_path / "x.nii.gz").data, written)


def test_broken_made_files(tmp_path):
    head = head_array()
    path = tmp_path / "x.nii.gz"
    assert "dimensions" in reason(save(path, head[..., 0]))
    assert "dimensions" in reason(save(path, np.stack([head, head], axis=-1)))
    assert "equal" in reason(save(path, np.full((40, 40, 4), 7, np.int16)))
    assert "grey levels" in reason(save(path, (head > 300).astype(np.uint8)))
    nan = head.astype(np.float32)
    nan[20, 20, 2] = np.nan
    assert "NaN" in reason(save(path, nan))
    assert "NaN" in reason(save(path, np.where(head > 650, 1e300, head).astype(np.float64)))
    assert "coarse" in reason(save(path, head, np.diag([10.0, 10, 10, 1])))
    assert "smaller than" in reason(save(path, head[:20, :20]))
    flat = save(tmp_path / "flat.nii", head)
    raw = bytearray(flat.read_bytes())
    raw[312:328] = bytes(16)  # the third row of the affine
    flat.write_bytes(raw)
    assert "affine" in reason(flat)
    assert "colours" in reason(save(path, head.astype(np.complex64)))
    assert "dimensions" in reason(save(path, head[:, :, :0]))
    assert "dimensions" in reason(save(path, head[:0]))
    assert "NIfTI" in reason(tmp_path / "gone.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    assert "NIfTI" in reason(tmp_path / "folder.nii.gz")
    assert "NIfTI" in reason(Path(save_mgh(tmp_path / "x.mgz", head)))


def save_mgh(path: Path, data: np.ndarray) -> Path:
    nib.MGHImage(data.astype(np.float32), np.eye(4)).to_filename(path)
    return path


def test_a_header_that_declares_too_much_is_refused_before_memory_is_taken(tmp_path):
    path = save(tmp_path / "x.nii", head_array())
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array([32767, 32767, 32767], "<i2").tobytes()
    path.write_bytes(raw)
    assert "voxels" in reason(path)


def test_damaged_bytes_never_give_a_traceback(tmp_path):
    """Header bytes at random: a usable volume or one line, whatever they say."""
    rng = np.random.default_rng(11)
    whole = save(tmp_path / "x.nii", head_array(shape=(34, 36, 3))).read_bytes()
    refused = 0
    for trial in range(160):
        raw = bytearray(whole)
        for place in rng.integers(0, 352, size=rng.integers(1, 6)):
            raw[place] = rng.integers(256)
        path = tmp_path / f"y{'.nii' if trial % 4 else '.nii.gz'}"
        path.write_bytes(bytes(raw) if trial % 4 else gzip.compress(bytes(raw), 1))
        try:
            volume = read_volume(path)
        except Refused as refusal:
            refused += "\n" not in str(refusal)
        else:
            assert np.isfinite(volume.data).all()
            assert volume.to_native(volume.data).shape == volume.native_shape
            cut_slices(volume, 64, 2)
    assert refused > 20


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    whole = save(tmp_path / "x.nii.gz", head_array(shape=(34, 36, 3))).read_bytes()
    for keep in (0, 1, 10, 100, 400, len(whole) // 2, len(whole) - 20):
        (tmp_path / "cut.nii.gz").write_bytes(whole[:keep])
        reason(tmp_path / "cut.nii.gz")
