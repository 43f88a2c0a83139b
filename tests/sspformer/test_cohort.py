"""A hospital's patients: what is broken is skipped and reported, and the site carries on."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from sspformer.contract.errors import Code, Refused
from sspformer.data.cohort import open_cohort
from sspformer.data.split import split
from tests.phantom import write_dataset, write_participants, write_scan


def test_a_cohort_has_every_patient_once(cohort):
    assert (cohort.train, cohort.test) == split(f"sub-{i:02d}" for i in range(8))
    assert set(cohort.entries) == {*cohort.train, *cohort.test}
    assert cohort.skipped == []
    assert cohort.mri_bytes > 0


def test_broken_scans_are_skipped_and_reported(tmp_path, make_cache):
    folder = write_dataset(tmp_path / "data", 8)
    full = open_cohort(folder, ("T1w",), make_cache())
    victims = [full.train[0], full.train[1], full.test[0]]
    paths = [folder / name / "anat" / f"{name}_T1w.nii.gz" for name in victims]
    paths[0].write_bytes(paths[0].read_bytes()[:500])
    paths[1].unlink()
    paths[1].symlink_to(tmp_path / "not-fetched")
    paths[2].write_bytes(b"")
    cohort = open_cohort(folder, ("T1w",), make_cache())
    assert cohort.train == full.train[2:]
    assert cohort.test == full.test[1:]
    assert {s.where for s in cohort.skipped} == {str(p) for p in paths}
    assert all(s.reason for s in cohort.skipped)


def test_one_broken_scan_of_a_patient_leaves_the_other(tmp_path, make_cache):
    folder = write_dataset(tmp_path / "data", 3)
    write_scan(folder, "sub-00", session="ses-1", seed=40)
    whole = open_cohort(folder, ("T1w",), make_cache())
    assert whole.slice_count("sub-00") == 6
    (folder / "sub-00/ses-1/anat/sub-00_ses-1_T1w.nii.gz").write_bytes(b"junk")
    cohort = open_cohort(folder, ("T1w",), make_cache())
    assert cohort.slice_count("sub-00") == 3
    assert len(cohort.skipped) == 1


def test_nothing_usable_is_one_line(tmp_path, make_cache):
    folder = write_dataset(tmp_path / "data", 2)
    for path in folder.glob("sub-*/anat/*"):
        path.write_bytes(b"")
    with pytest.raises(Refused, match="no training patient") as caught:
        open_cohort(folder, ("T1w",), make_cache())
    assert caught.value.code is Code.DATA
    assert "\n" not in str(caught.value)


def test_an_opt_out_leaves_the_cohort_and_the_disk(tmp_path, make_cache):
    folder, cache = write_dataset(tmp_path / "data", 8), make_cache()
    before = open_cohort(folder, ("T1w",), cache)
    victim = before.train[0]
    places = {entry.path for entry in before.entries[victim]}
    write_participants(folder, {victim: "yes"})
    after = open_cohort(folder, ("T1w",), cache)
    assert victim not in after.entries
    assert victim not in after.train + after.test
    assert not any(path.exists() for path in places)
    assert all(entry.path.exists() for entries in after.entries.values() for entry in entries)


def test_when_everybody_opts_out_nothing_stays_on_the_disk(tmp_path, make_cache):
    """The dataset is refused then, and the cache is emptied all the same."""
    folder, cache = write_dataset(tmp_path / "data", 3), make_cache()
    open_cohort(folder, ("T1w",), cache)
    write_participants(folder, dict.fromkeys(("sub-00", "sub-01", "sub-02"), "yes"))
    with pytest.raises(Refused):
        open_cohort(folder, ("T1w",), cache)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_not_taken_for_broken_scans(tmp_path, make_cache, monkeypatch):
    folder, cache = write_dataset(tmp_path / "data", 3), make_cache()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    with pytest.raises(Refused, match="No space left") as caught:
        open_cohort(folder, ("T1w",), cache)
    assert caught.value.code is Code.STATE


def test_variants_are_for_training_patients_only(tmp_path, make_cache):
    cohort = open_cohort(write_dataset(tmp_path / "data", 4), ("T1w",), make_cache(), variants=2)
    assert {len(cohort.entries[s]) for s in cohort.train} == {2}
    assert {len(cohort.entries[s]) for s in cohort.test} == {1}
    assert cohort.slice_count(cohort.train[0]) == 6


def test_every_slice_has_its_number(tmp_path, make_cache):
    cohort = open_cohort(write_dataset(tmp_path / "data", 3), ("T1w",), make_cache(), variants=2)
    subject = cohort.train[0]
    bases = torch.cat([e.base for e in cohort.examples(subject)])
    features = torch.cat([e.features for e in cohort.examples(subject)])
    for number in range(cohort.slice_count(subject)):
        f, base, target, inside = cohort.slice_at(subject, number)
        assert torch.equal(base[0], bases[number])
        assert torch.equal(f, features[number])
        assert base.shape == target.shape == inside.shape == (1, 64, 64)
    with pytest.raises(IndexError):
        cohort.slice_at(subject, cohort.slice_count(subject))


def test_progress_counts_patients(tmp_path, make_cache):
    seen: list[tuple[int, int]] = []
    open_cohort(write_dataset(tmp_path / "data", 3), ("T1w",), make_cache(), progress=lambda *a: seen.append(a))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_the_awkward_folder_as_a_hospital(tmp_path, shared_data, make_cache):
    """Every awkward file as one patient's scan, with three sound patients: the site carries on with what is usable."""
    folder = write_dataset(tmp_path / "data", 3)
    files = [p for p in sorted((shared_data / "awkward").iterdir()) if p.name.endswith((".nii", ".nii.gz"))]
    for number, path in enumerate(files):
        ending = ".nii.gz" if path.name.endswith(".gz") else ".nii"
        place = folder / f"sub-A{number:02d}" / "anat" / f"sub-A{number:02d}_T1w{ending}"
        place.parent.mkdir(parents=True)
        place.symlink_to(path)
    cohort = open_cohort(folder, ("T1w",), make_cache())
    assert {"sub-00", "sub-01", "sub-02"} <= set(cohort.entries)
    assert len(cohort.entries) + len(cohort.skipped) == 3 + len(files)
    assert len(cohort.skipped) == 10
    for entries in cohort.entries.values():
        example = cohort.cache.load(entries[0])
        assert np.isfinite(example.features.float().numpy()).all()
        assert example.inside.any()


def test_a_run_on_another_contrast_takes_nobody_out_of_the_cache(tmp_path, make_cache):
    """Half of the patients have no T2w; a cohort on T2w must not empty the warm T1w cohort under somebody's feet."""
    folder = write_dataset(tmp_path / "data", 6)
    for i in range(3):
        write_scan(folder, f"sub-{i:02d}", suffix="T2w", seed=50 + i)
    warm = open_cohort(folder, ("T1w",), make_cache())
    open_cohort(folder, ("T2w",), make_cache())
    assert warm.is_whole()
    assert all(warm.examples(subject) for subject in warm.entries)
    write_participants(folder, {"sub-05": "yes"})  # who has no T2w either: the opt-out counts all the same
    open_cohort(folder, ("T2w",), make_cache())
    assert not any(entry.path.exists() for entry in warm.entries["sub-05"])
    assert not warm.is_whole()


def test_a_patient_who_is_gone_from_the_folder_is_gone_from_the_cache(tmp_path, make_cache):
    folder = write_dataset(tmp_path / "data", 5)
    warm = open_cohort(folder, ("T1w",), make_cache())
    shutil.rmtree(folder / "sub-03")
    open_cohort(folder, ("T1w",), make_cache())
    assert not any(entry.path.exists() for entry in warm.entries["sub-03"])
