"""Hospitals warped from one brain: the same bytes every time, and different from one another as they should be."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from sspformer.contract.errors import Code, Refused
from sspformer.data.bids import read_dataset
from sspformer.data.mni import SCANNERS, make_hospital, make_patient
from sspformer.data.slices import cut_slices
from sspformer.data.volume import read_volume, slice_axis


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    root = tmp_path_factory.mktemp("hospitals")
    for name in SCANNERS:
        make_hospital(root / name, name, 2, seed=5, slices=2)
    return root


def test_patients_are_the_same_every_time_and_differ():
    first = make_patient(SCANNERS["north"], 11, 1)
    again, other = make_patient(SCANNERS["north"], 11, 1), make_patient(SCANNERS["north"], 12, 1)
    assert np.array_equal(first.dataobj, again.dataobj)
    assert np.array_equal(first.affine, again.affine)
    assert not np.array_equal(first.dataobj, other.dataobj)


def test_hospitals_differ_in_grid_and_axes(hospitals):
    images = {
        n: nib.load(hospitals / n / f"sub-{n[0].upper()}0001/anat/sub-{n[0].upper()}0001_T1w.nii.gz") for n in SCANNERS
    }
    assert {n: "".join(nib.aff2axcodes(i.affine)) for n, i in images.items()} == {
        n: s.axes for n, s in SCANNERS.items()
    }
    for name, image in images.items():
        expected = sorted([SCANNERS[name].pixel_mm] * 2 + [SCANNERS[name].thickness_mm])
        assert sorted(map(float, image.header.get_zooms())) == pytest.approx(expected, abs=1e-4)
    assert len({image.shape for image in images.values()}) == 3


def test_hospitals_read_as_real_datasets(hospitals):
    for name in SCANNERS:
        dataset = read_dataset(hospitals / name, ("T1w",))
        assert len(dataset.subjects) == 2
        volume = read_volume(next(iter(dataset.subjects.values()))[0].path)
        assert slice_axis(volume) == 2
        stack = cut_slices(volume, 224, 2)
        assert len(stack.images) == 2
        assert 0.15 < stack.head.mean() < 0.8
        assert "not different people" in json.loads((hospitals / name / "dataset_description.json").read_text())["Name"]


def test_patients_of_one_hospital_differ(hospitals):
    a, b = (nib.load(p).get_fdata() for p in sorted((hospitals / "north").glob("sub-*/anat/*.nii.gz")))
    assert not np.array_equal(a, b)


def test_refusals(tmp_path):
    with pytest.raises(Refused) as caught:
        make_hospital(tmp_path / "x", "south", 1)
    assert caught.value.code is Code.CONFIG
    (tmp_path / "file").write_text("keep me")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(Refused) as caught:
            make_hospital(place, "north", 1)
        assert caught.value.code is Code.STATE
    assert (tmp_path / "file").read_text() == "keep me"
