"""Every command of `sspformer` on small real input; whatever is wrong with it is one line and exit 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sspformer.checkpoint import file_digest, load_encoder, load_head, read_gradient_rms, save_module
from sspformer.cli import main
from sspformer.model.assembly import Head, build_encoder
from sspformer.reference import ENCODER, FOLDER, HEAD
from tests.phantom import MINI, head_image, run_command, write_dataset


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with an encoder, a head, a dataset of four patients and one scan."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    digest = save_module(folder / "encoder", build_encoder(MINI), MINI, "encoder")
    save_module(folder / "head", Head(MINI), MINI, "head", encoder_digest=digest)
    write_dataset(folder / "data", 4)
    head_image(1, (120, 132, 2), "PIR").to_filename(folder / "sub-01_T1w.nii.gz")
    return folder


@pytest.fixture
def sspformer(capsys):
    def call(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        got = run_command(main, *arguments)
        out, err = capsys.readouterr()
        assert got == status, (got, out, err)
        if status == 2:
            *progress, err = err.splitlines()
            assert all(re.fullmatch(r"[a-z ]+: \d+(/\d+)?", line) for line in progress), progress
            assert " Next: " in err
            return err
        return out

    return call


def test_info(sspformer):
    out = sspformer("info", "--preset", "paper")
    assert "211,102" in out
    assert "head, trainable" in out
    assert "E-CONFIG" in sspformer("info", "--preset", "huge", status=2)
    assert "E-CONFIG" in sspformer("info", "--tail", "unet", status=2)


def test_finetune_then_evaluate_then_predict(sspformer, small, tmp_path):
    data, cache, out = small / "data", tmp_path / "cache", tmp_path / "tuned.safetensors"
    pair = ("--encoder", small / "encoder", "--cache", cache, "--threads", "1")
    said = sspformer("finetune", data, "--out", out, *pair, "--head", small / "head", "--steps", "3", "--batch", "1")
    assert "3 patients, 3 steps" in said
    assert file_digest(out) in said
    load_head(out, of=MINI, encoder_digest=file_digest(small / "encoder"))
    scored = sspformer("evaluate", data, *pair, "--head", f"tuned={out}")
    lines = {line.split()[0]: line for line in scored.splitlines()[1:]}
    assert set(lines) == {"input", "nlm", "tuned"}
    assert all("PSNR" in line and "SSIM" in line for line in lines.values())
    target = tmp_path / "sub-01_desc-denoised_T1w.nii.gz"
    sspformer("predict", small / "sub-01_T1w.nii.gz", target, "--encoder", small / "encoder", "--head", out)
    source, written = nib.load(small / "sub-01_T1w.nii.gz"), nib.load(target)
    assert written.shape == source.shape
    assert np.array_equal(written.affine, source.affine)
    assert json.loads((tmp_path / "sub-01_desc-denoised_T1w.json").read_text())["Head"] == file_digest(out)
    assert "exists already" in sspformer("predict", small / "sub-01_T1w.nii.gz", target, status=2)


def test_finetune_is_repeatable(sspformer, small, tmp_path):
    options = (
        "--encoder",
        small / "encoder",
        "--head",
        small / "head",
        "--steps",
        "2",
        "--batch",
        "1",
        "--threads",
        "1",
    )
    for name in ("a", "b"):
        sspformer("finetune", small / "data", "--out", tmp_path / name, "--cache", tmp_path / "cache", *options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_predict_with_the_packaged_weights(sspformer, small, tmp_path):
    sspformer("predict", small / "sub-01_T1w.nii.gz", tmp_path / "out.nii.gz")
    written, source = (nib.load(p).get_fdata() for p in (tmp_path / "out.nii.gz", small / "sub-01_T1w.nii.gz"))
    assert np.isfinite(written).all()
    assert np.corrcoef(written.ravel(), source.ravel())[0, 1] > 0.95
    assert not np.allclose(written, source)


def test_a_head_of_another_encoder_is_refused_everywhere(sspformer, small, tmp_path):
    """Same architecture, other weights: the features would be other ones, and nothing else would notice."""
    torch.manual_seed(7)
    other = tmp_path / "encoder"
    save_module(other, build_encoder(MINI), MINI, "encoder")
    pair = ("--encoder", other)
    cached = (*pair, "--cache", tmp_path / "cache")
    for command in (
        ("predict", small / "sub-01_T1w.nii.gz", tmp_path / "o.nii.gz", *pair, "--head", small / "head"),
        ("finetune", small / "data", "--out", tmp_path / "h", *cached, "--head", small / "head"),
        ("evaluate", small / "data", *cached, "--head", f"x={small / 'head'}"),
    ):
        assert "E-TENSORS" in sspformer(*command, status=2), command


def test_pretrain_and_resume(sspformer, tmp_path):
    data = write_dataset(tmp_path / "data", 2)
    command = ("pretrain", data, "--out", tmp_path / "out", "--steps", "1", "--batch", "1")
    assert str(tmp_path / "out" / "encoder.safetensors") in sspformer(*command)
    load_encoder(tmp_path / "out" / "encoder.safetensors")
    assert "--device" in sspformer(*command, "--device", "tpu", status=2)


def test_cohort(sspformer, tmp_path):
    sspformer("cohort", tmp_path / "west", "--hospital", "west", "--patients", "1", "--slices", "1")
    assert len(list((tmp_path / "west").glob("sub-*/anat/*.nii.gz"))) == 1
    assert "E-STATE" in sspformer("cohort", tmp_path / "west", "--hospital", "west", status=2)
    assert "E-CONFIG" in sspformer("cohort", tmp_path / "x", "--hospital", "moon", status=2)


def test_reference(sspformer):
    assert Path(sspformer("reference", "--path").strip()) == FOLDER
    assert (ENCODER.stat().st_size + HEAD.stat().st_size) <= 8_000_000
    _, arch = load_encoder(ENCODER)
    load_head(HEAD, of=arch, encoder_digest=file_digest(ENCODER))
    assert read_gradient_rms(HEAD)


def test_reference_says_what_it_is(sspformer):
    out = sspformer("reference")
    assert file_digest(ENCODER) in out
    assert file_digest(HEAD) in out
    assert "not" in (FOLDER / "MODEL_CARD.md").read_text()


def test_bad_data_folders(sspformer, small, tmp_path):
    def finetune(data, *more):
        return sspformer("finetune", data, "--out", tmp_path / "h", "--cache", tmp_path / "c", *more, status=2)

    assert "does not exist" in finetune(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "no sub-*" in finetune(tmp_path / "empty")
    assert "FLAIR" in finetune(small / "data", "--contrast", "FLAIR")
    broken = write_dataset(tmp_path / "broken", 2)
    for path in broken.glob("sub-*/anat/*"):
        path.write_bytes(b"not an image")
    assert "E-DATA" in finetune(broken)
    assert not (tmp_path / "h").exists()


def test_bad_weights(sspformer, small, tmp_path):
    base = ("finetune", small / "data", "--out", tmp_path / "h", "--cache", tmp_path / "c")
    assert "E-TENSORS" in sspformer(*base, "--encoder", small / "encoder", status=2)  # the packaged head does not fit
    assert "E-FORMAT" in sspformer(*base, "--encoder", small / "head", status=2)
    assert "E-STATE" in sspformer(*base, "--encoder", tmp_path / "gone", status=2)
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04\x95")
    assert "E-FORMAT" in sspformer(*base, "--encoder", tmp_path / "pickle.pt", status=2)
    scan, out = small / "sub-01_T1w.nii.gz", tmp_path / "o.nii.gz"
    assert "E-TENSORS" in sspformer("predict", scan, out, "--head", small / "head", status=2)
    evaluate = ("evaluate", small / "data", "--cache", tmp_path / "c", "--encoder", small / "encoder", "--head")
    assert "E-CONFIG" in sspformer(*evaluate, "nonsense", status=2)
    assert "E-STATE" in sspformer(*evaluate, f"a={tmp_path / 'gone'}", status=2)
    assert "E-TENSORS" in sspformer(*evaluate, f"a={HEAD}", status=2)


def test_places_that_cannot_be_written(sspformer, small, tmp_path):
    (tmp_path / "file").write_text("")
    options = ("--encoder", small / "encoder", "--head", small / "head", "--steps", "1", "--batch", "1")
    data = small / "data"
    assert "cache" in sspformer(
        "finetune", data, "--out", tmp_path / "h", "--cache", tmp_path / "file", *options, status=2
    )
    out = tmp_path / "file" / "head"
    assert "E-STATE" in sspformer("finetune", data, "--out", out, "--cache", tmp_path / "c", *options, status=2)


def test_every_awkward_file_through_predict(sspformer, small, shared_data, tmp_path):
    """What is refused is one line that names the file; nothing is written then."""
    refused = {
        "4d_pcasl_52x68x20x10.nii.gz", "lowres_10mm_19x26x32.nii.gz", "label_float64.nii.gz", "made_all_zero.nii.gz",
        "dicom_MR-SIEMENS-DICOM-WithOverlays.dcm", "dicom_MR_small.dcm", "nib_example_nifti2.nii.gz",
        "made_nan_inf.nii.gz",
        "rgb_structured_dtype.nii.gz", "made_truncated.nii.gz", "made_not_gzip.nii.gz", "made_zero_bytes.nii.gz",
    }  # fmt: skip
    for name in sorted(refused):
        said = sspformer("predict", shared_data / "awkward" / name, tmp_path / "out.nii", "--contrast", "T1w",
                         "--encoder", small / "encoder", "--head", small / "head", status=2)  # fmt: skip
        assert name in said
        assert said.startswith("E-DATA: ")
    assert list(tmp_path.iterdir()) == []
    single = shared_data / "awkward" / "single_slice_192x192x1_PIR.nii.gz"
    sspformer("predict", single, tmp_path / "out.nii", "--contrast", "T1w", "--encoder", small / "encoder",
              "--head", small / "head")  # fmt: skip
    assert nib.load(tmp_path / "out.nii").shape == (192, 192, 1)
    assert np.array_equal(nib.load(tmp_path / "out.nii").affine, nib.load(single).affine)


def test_in_a_process_of_its_own_a_refusal_is_one_line(tmp_path):
    """A damaged header that its library would comment on, through the installed command."""
    head_image(1, (40, 44, 2)).to_filename(tmp_path / "sub-01_T1w.nii")
    raw = bytearray((tmp_path / "sub-01_T1w.nii").read_bytes())
    raw[0:4] = (7).to_bytes(4, "little")
    raw[70:72] = (2**14).to_bytes(2, "little")
    (tmp_path / "sub-01_T1w.nii").write_bytes(raw)
    command = [sys.executable, "-m", "sspformer.cli", "predict", tmp_path / "sub-01_T1w.nii", tmp_path / "out.nii"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "sub-01_T1w.nii" in done.stderr
