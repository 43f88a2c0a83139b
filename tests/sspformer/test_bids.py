"""Reading a hospital's folder: who is in, who is out, and that nobody slips in by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from sspformer.contract.errors import Code, Refused
from sspformer.data.bids import contrast_of, contrasts_in, read_dataset, read_opt_outs
from tests.phantom import write_participants


def touch(folder: Path, name: str) -> Path:
    """An empty file: this module never opens an image."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def three(folder: Path) -> Path:
    for i in (1, 2, 3):
        touch(folder, f"sub-0{i}/anat/sub-0{i}_T1w.nii.gz")
    return folder


def refusal(function, *args) -> Refused:
    with pytest.raises(Refused) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "said", ["yes", "YES", " Yes ", "y", "1", "1.0", "true", "x", "opted out", "ja", '"yes"', "2024-05-01", "unknown"]
)
def test_everything_but_a_plain_no_opts_out(tmp_path, said):
    write_participants(three(tmp_path), {"sub-01": said, "sub-02": "no", "sub-03": "no"})
    dataset = read_dataset(tmp_path, ("T1w",))
    assert sorted(dataset.subjects) == ["sub-02", "sub-03"]
    assert [(s.where, s.reason) for s in dataset.skipped] == [("sub-01", "opted out")]


@pytest.mark.parametrize("said", ["no", "No", "n", "0", "false", "n/a", "N/A", "", " ", '"no"'])
def test_a_plain_no_stays(tmp_path, said):
    write_participants(three(tmp_path), {"sub-01": said, "sub-02": "yes"})
    assert sorted(read_dataset(tmp_path, ("T1w",)).subjects) == ["sub-01", "sub-03"]


@pytest.mark.parametrize("spelt", ["sub-01", "01", "SUB-01", "1", "sub-1", '"sub-01"', " sub-01 "])
def test_identifiers_as_spreadsheets_leave_them(tmp_path, spelt):
    write_participants(three(tmp_path), {spelt: "yes"})
    assert sorted(read_dataset(tmp_path, ("T1w",)).subjects) == ["sub-02", "sub-03"]


@pytest.mark.parametrize(
    "header",
    [
        "participant_id\topt_out",
        "\ufeffparticipant_id\topt_out",
        "Participant_ID\tOpt-Out",
        "age\tOPT_OUT\tparticipant_id",
    ],
)
def test_headers_in_other_spelling_and_order(tmp_path, header):
    columns = {"age": "70", "opt_out": "yes", "participant_id": "sub-01"}
    names = [name.strip("\ufeff").lower().replace("-", "_") for name in header.split("\t")]
    row = "\t".join(columns[name] for name in names)
    (three(tmp_path) / "participants.tsv").write_text(f"{header}\r\n{row}\r\n", encoding="utf-8")
    assert "sub-01" in read_opt_outs(tmp_path)


def test_a_stray_quote_does_not_swallow_an_opt_out(tmp_path):
    text = 'participant_id\tcomment\topt_out\nsub-01\t"fell asleep\tno\nsub-02\tok\tyes\nsub-03\tok"\tno\n'
    (three(tmp_path) / "participants.tsv").write_text(text)
    assert sorted(read_dataset(tmp_path, ("T1w",)).subjects) == ["sub-01", "sub-03"]


def test_one_yes_among_several_rows_counts(tmp_path):
    rows = "participant_id\tsession\topt_out\nsub-01\t1\tyes\nsub-01\t2\tno\n"
    (three(tmp_path) / "participants.tsv").write_text(rows)
    assert "sub-01" not in read_dataset(tmp_path, ("T1w",)).subjects


def test_tables_without_opt_outs(tmp_path):
    three(tmp_path)
    assert read_opt_outs(tmp_path) == set()
    for text in ("", "\n", "participant_id\nsub-01\n", "participant_id\topt_out\nsub-01\n"):
        (tmp_path / "participants.tsv").write_text(text)
        assert read_opt_outs(tmp_path) == set()
        assert len(read_dataset(tmp_path, ("T1w",)).subjects) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"participant_id\topt_out\nsub-01\t\xff\xfe\n",
        b"name\topt_out\nsub-01\tyes\n",
        b"participant_id,opt_out\nsub-01,yes\n",
        "participant_id\topt_out\n".encode("utf-16"),
    ],
)
def test_an_unreadable_table_refuses(tmp_path, content):
    (three(tmp_path) / "participants.tsv").write_bytes(content)
    refused = refusal(read_dataset, tmp_path, ("T1w",))
    assert refused.code is Code.DATA
    assert "participants.tsv" in refused.what


def test_a_table_that_is_a_folder_or_a_dead_link_refuses(tmp_path):
    (three(tmp_path) / "participants.tsv").mkdir()
    assert refusal(read_dataset, tmp_path, ("T1w",)).code is Code.DATA
    (tmp_path / "participants.tsv").rmdir()
    (tmp_path / "participants.tsv").symlink_to(tmp_path / "not-fetched")
    assert refusal(read_dataset, tmp_path, ("T1w",)).code is Code.DATA


def test_missing_empty_and_fruitless_folders(tmp_path):
    assert "does not exist" in refusal(read_dataset, tmp_path / "gone", ("T1w",)).what
    assert "no sub-*" in refusal(read_dataset, tmp_path, ("T1w",)).what
    touch(tmp_path, "file")
    assert "does not exist" in refusal(read_dataset, tmp_path / "file", ("T1w",)).what
    three(tmp_path)
    assert "FLAIR" in refusal(read_dataset, tmp_path, ("FLAIR",)).what


def test_a_subject_without_the_asked_contrast_is_skipped_and_reported(tmp_path):
    touch(three(tmp_path), "sub-04/anat/sub-04_T2w.nii.gz")
    (tmp_path / "sub-05").mkdir()
    dataset = read_dataset(tmp_path, ("T1w", "FLAIR"))
    assert sorted(dataset.subjects) == ["sub-01", "sub-02", "sub-03"]
    assert {s.where: s.reason for s in dataset.skipped} == {
        "sub-04": "no scan of contrast T1w, FLAIR", "sub-05": "no scan of contrast T1w, FLAIR"}  # fmt: skip


def test_sessions_and_order(tmp_path):
    touch(tmp_path, "sub-b/ses-2/anat/sub-b_ses-2_T1w.nii.gz")
    touch(tmp_path, "sub-b/ses-1/anat/sub-b_ses-1_T1w.nii")
    touch(tmp_path, "sub-a/anat/sub-a_T1w.nii.gz")
    subjects = read_dataset(tmp_path, ("T1w",)).subjects
    assert list(subjects) == ["sub-a", "sub-b"]
    assert [scan.path.parent.parent.name for scan in subjects["sub-b"]] == ["ses-1", "ses-2"]
    assert {scan.subject for scan in subjects["sub-b"]} == {"sub-b"}


@pytest.mark.parametrize(
    ("name", "contrast"),
    [
        ("sub-01_T1w.nii.gz", "T1w"),
        ("sub-01_ce-gadolinium_T1w.nii.gz", "ce-T1w"),
        ("sub-01_ses-1_ce-gad_run-2_T1w.nii", "ce-T1w"),
        ("sub-01_space-MNI_T1w.nii.gz", "T1w"),  # spa-ce- is no contrast agent
        ("sub-01_acq-trace-1_T1w.nii.gz", "T1w"),
        ("sub-01_part-phase_T2starw.nii.gz", None),
        ("sub-01_part-mag_T2starw.nii.gz", "T2starw"),
        ("T1w.nii.gz", None),
        ("sub-01_T1w.json", None),
        ("._sub-01_T1w.nii.gz", None),
    ],
)
def test_contrast_of_a_file_name(name, contrast):
    assert contrast_of(Path(name)) == contrast


def test_plain_and_enhanced_are_different_contrasts(tmp_path):
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz")
    for asked in ("T1w", "ce-T1w"):
        (scan,) = read_dataset(tmp_path, (asked,)).subjects["sub-01"]
        assert scan.contrast == asked
    assert contrasts_in(tmp_path) == {"T1w": 1, "ce-T1w": 1}


def test_files_of_another_subject_labels_and_derivatives_are_not_read(tmp_path):
    three(tmp_path)
    touch(tmp_path, "sub-01/anat/sub-99_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_label-tumour_mask.nii.gz")
    touch(tmp_path, "derivatives/manual/sub-01/anat/sub-01_T1w.nii.gz")
    dataset = read_dataset(tmp_path, ("T1w",))
    assert [s.path.name for s in dataset.subjects["sub-01"]] == ["sub-01_T1w.nii.gz"]


def test_the_real_hospitals(shared_data):
    counts = {h: contrasts_in(shared_data / f"hospital-{h}") for h in "abcd"}
    assert counts["a"] == {"T1w": 10, "FLAIR": 10, "ce-T1w": 10}
    assert counts["b"] == {"T1w": 12, "FLAIR": 12, "ce-T1w": 12}
    assert counts["c"] == {"T1w": 12, "FLAIR": 12, "ce-T1w": 12}
    assert counts["d"] == {"T1w": 4, "FLAIR": 4, "T2w": 3}
