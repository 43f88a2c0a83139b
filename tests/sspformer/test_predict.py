"""Applying a head to a scan: on the scan's own grid, in its own units, with nothing else of its header."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from sspformer.contract.errors import Code, Refused
from sspformer.model.assembly import Head
from sspformer.predict import check_target, estimate_noise, predict, save_prediction
from tests.phantom import MINI, head_array, head_image


@pytest.fixture(scope="module")
def untouched() -> Head:
    torch.manual_seed(0)
    return Head(MINI).eval()


@pytest.fixture
def darker(untouched) -> Head:
    """A head that takes 0.1 off every pixel."""
    head = Head(MINI).eval()
    head.load_state_dict(untouched.state_dict())
    torch.nn.init.constant_(head.tail.last.bias, -0.1)
    return head


def scan(tmp_path, axes="RAS", shape=(120, 132, 2), name="sub-01_T1w.nii.gz"):
    path = tmp_path / name
    head_image(3, shape, axes).to_filename(path)
    return path


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL", "ILA"])
def test_an_untrained_head_gives_the_scan_back_voxel_for_voxel(tmp_path, mini_encoder, untouched, axes):
    path = scan(tmp_path, axes)
    result = predict(path, mini_encoder, untouched)
    original = nib.load(path)
    assert result.data.shape == original.shape
    assert not result.resampled
    np.testing.assert_allclose(result.data, original.get_fdata(), atol=1e-3)
    target = tmp_path / "out" / "sub-01_desc-denoised_T1w.nii.gz"
    save_prediction(result, path, target, {"Task": "denoise"})
    written = nib.load(target)
    assert np.array_equal(written.affine, original.affine)
    assert nib.aff2axcodes(written.affine) == tuple(axes)
    assert written.get_data_dtype() == np.float32
    np.testing.assert_allclose(written.get_fdata(), original.get_fdata(), atol=1e-3)


@pytest.mark.parametrize("axes", ["RAS", "PIR"])
def test_what_the_head_does_lands_where_the_voxels_are(tmp_path, mini_encoder, darker, axes):
    path = scan(tmp_path, axes)
    original = nib.load(path).get_fdata()
    change = predict(path, mini_encoder, darker).data - original
    scale = np.percentile(original[original > 100], 99.5)
    bright = (original > 0.2 * scale) & (original < 0.95 * scale)
    assert np.median(change[bright]) == pytest.approx(-0.1 * scale, rel=0.1)
    assert change[original == 0].max() == 0  # air cannot become negative
    assert (predict(path, mini_encoder, darker).data >= 0).all()


def test_a_resampled_scan_keeps_its_place(tmp_path, mini_encoder, untouched):
    """Voxels of 1.2 x 1.8 mm: there and back through another grid, without a shift."""
    data = head_array(shape=(90, 66, 2))
    path = tmp_path / "sub-01_T1w.nii.gz"
    nib.Nifti1Image(data, np.diag([-1.2, 1.8, 5, 1])).to_filename(path)
    result = predict(path, mini_encoder, untouched)
    assert result.resampled
    difference, plain = result.data - data, data.astype(float)
    assert np.sqrt((difference**2).mean()) < 0.2 * plain.std()
    errors = [np.abs(np.roll(result.data, (dx, dy), (0, 1)) - plain).mean() for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    assert int(np.argmin(errors)) == 4  # not shifted: no other place fits better


def test_a_scan_with_negative_air_keeps_its_units(tmp_path, mini_encoder, untouched):
    image = nib.Nifti1Image((head_array(shape=(120, 132, 2)) * 2 - 1000).astype(np.int16), np.diag([3.0, 3, 6, 1]))
    image.to_filename(tmp_path / "sub-01_T1w.nii.gz")
    result = predict(tmp_path / "sub-01_T1w.nii.gz", mini_encoder, untouched)
    np.testing.assert_allclose(result.data, image.get_fdata(), atol=0.01)


def test_trailing_dimension_of_one(tmp_path, mini_encoder, untouched):
    path = tmp_path / "sub-01_T1w.nii.gz"
    nib.Nifti1Image(head_array(shape=(120, 132, 2))[..., None], np.diag([3.0, 3, 6, 1])).to_filename(path)
    assert predict(path, mini_encoder, untouched).data.shape == (120, 132, 2, 1)


def test_nothing_of_the_header_is_carried_over(tmp_path, mini_encoder, untouched):
    path = tmp_path / "sub-01_T1w.nii"
    image = head_image(3, (120, 132, 2))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = b"DOE JANE"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE JANE 1970-01-01"))
    image.to_filename(path)
    assert b"DOE" in path.read_bytes()
    save_prediction(predict(path, mini_encoder, untouched), path, tmp_path / "out.nii", {})
    assert b"DOE" not in (tmp_path / "out.nii").read_bytes()
    assert list(nib.load(tmp_path / "out.nii").header.extensions) == []
    assert b"DOE" not in (tmp_path / "out.json").read_bytes()


def test_the_awkward_file_with_a_name_in_its_header(tmp_path, shared_data, mini_encoder, untouched):
    source = shared_data / "awkward" / "made_phi_header_DOE_JANE.nii.gz"
    image = nib.load(source)
    slab = nib.Nifti1Image(np.asarray(image.dataobj)[:, :, 14:16], image.affine, image.header)
    slab.to_filename(tmp_path / "sub-01_T1w.nii")
    assert b"DOE" in (tmp_path / "sub-01_T1w.nii").read_bytes()
    result = predict(tmp_path / "sub-01_T1w.nii", mini_encoder, untouched)
    save_prediction(result, tmp_path / "sub-01_T1w.nii", tmp_path / "out.nii", {})
    assert b"DOE" not in (tmp_path / "out.nii").read_bytes()


def test_the_sidecar_says_how_it_was_made(tmp_path, mini_encoder, untouched):
    path = scan(tmp_path)
    save_prediction(predict(path, mini_encoder, untouched), path, tmp_path / "out.nii.gz", {"Head": "sha256:abc"})
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert sidecar["Head"] == "sha256:abc"
    assert sidecar["Sources"] == ["sub-01_T1w.nii.gz"]
    assert "not for diagnosis" in sidecar["Description"]
    assert sidecar["Resampled"] is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.nii.gz", "sub-01_T1w.nii.gz"]


def refusal(function, *args) -> Refused:
    with pytest.raises(Refused) as caught:
        function(*args)
    return caught.value


def test_an_existing_target_is_never_overwritten(tmp_path, mini_encoder, untouched):
    path = scan(tmp_path)
    before = path.read_bytes()
    assert refusal(check_target, path).code is Code.STATE
    assert refusal(save_prediction, predict(path, mini_encoder, untouched), path, path, {}).code is Code.STATE
    assert path.read_bytes() == before
    assert refusal(check_target, tmp_path / "out.png").code is Code.STATE
    (tmp_path / "out.json").write_text("{}")
    assert "out.json" in refusal(check_target, tmp_path / "out.nii.gz").what
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    assert refusal(check_target, tmp_path / "link.nii.gz").code is Code.STATE


def test_a_target_that_cannot_be_written_leaves_nothing(tmp_path, mini_encoder, untouched):
    path = scan(tmp_path)
    (tmp_path / "file").write_text("")
    result = predict(path, mini_encoder, untouched)
    assert refusal(save_prediction, result, path, tmp_path / "file" / "out.nii.gz", {}).code is Code.STATE


def test_the_contrast_comes_from_the_name_or_the_caller(tmp_path, mini_encoder, untouched):
    path = scan(tmp_path, name="head.nii.gz")
    assert "--contrast" in refusal(predict, path, mini_encoder, untouched).next_step
    predict(path, mini_encoder, untouched, "T1w")
    assert "no channel" in refusal(predict, path, mini_encoder, untouched, "bold").what


def test_noise_is_estimated():
    """The robust estimate finds the noise that was added, within a fifth."""
    clean = np.clip(head_array(shape=(120, 120, 3)).astype(np.float32).transpose(2, 0, 1) / 700, 0, 1)
    clean[clean > 0.1] = 0.7
    noisy = clean + np.random.default_rng(0).normal(0, 0.08, clean.shape).astype(np.float32)
    assert estimate_noise(noisy) == pytest.approx(0.08, rel=0.2)
    assert estimate_noise(np.zeros((2, 64, 64), np.float32)) == 0.0
