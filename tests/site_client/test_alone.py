"""A hospital on its own: finetune, evaluate and apply through the command line, without any coordinator."""

from __future__ import annotations

import json
import re
import socket
import stat
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from site_client.cli import main
from sspformer.checkpoint import file_digest, load_head, save_module
from sspformer.contract.keys import save_public
from sspformer.contract.manifest import Artifact, Manifest, seal_manifest
from sspformer.data.mni import make_hospital as make_warped
from sspformer.model.assembly import Head
from sspformer.reference import ENCODER, HEAD
from tests.phantom import MINI, head_image, run_command, write_participants


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a hospital on its own opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def site_client(capsys):
    def call(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        got = run_command(main, *arguments)
        out, err = capsys.readouterr()
        assert got == status, (got, out, err)
        if status == 2:
            *progress, err = err.splitlines()
            assert all(re.fullmatch(r"[a-z ]+: \d+(/\d+)?", line) for line in progress), progress
            return err
        return out

    return call


@pytest.fixture
def hospital(make_hospital):
    """A site that joined and fetched: its manifest names the small pair."""
    made = make_hospital()
    key = Ed25519PrivateKey.generate()
    save_public(made.root / "keys" / "coordinator.pub", key.public_key())
    artifacts = [
        {"role": role, "digest": digest, "bytes": (made.root / "store" / digest.replace(":", "-")).stat().st_size,
         "preset": "mini", "task": "denoise" if role == "head" else None, "file_name": f"{role}.safetensors"}
        for role, digest in (("encoder", made.encoder), ("head", made.head))
    ]  # fmt: skip
    manifest = Manifest(federation="demo", sequence=1, artifacts=[Artifact.model_validate(a) for a in artifacts])
    (made.root / "store" / "manifest.json").write_bytes(seal_manifest(manifest, key))
    return made


def test_finetune_evaluate_apply(site_client, hospital, tmp_path):
    said = site_client("finetune", hospital.root, "--steps", "3")
    local = hospital.root / "heads" / "local.safetensors"
    assert "7 patients, 3 steps" in said
    assert "2 held-out patients" in said
    head, arch = load_head(local, encoder_digest=hospital.encoder)
    assert arch == MINI
    assert any(p.detach().abs().max() > 0 for name, p in head.named_parameters() if name.startswith("tail.last"))

    scores, pictures = tmp_path / "deep" / "scores.json", tmp_path / "pictures.npz"
    table = site_client("evaluate", hospital.root, "--head", f"local={local}", "--json", scores, "--pictures", pictures)
    assert "local" in table
    found = json.loads(scores.read_text())
    assert (found["patients_train"], found["patients_test"]) == (7, 2)
    assert set(found["methods"]) == {"input", "nlm", "warm", "local"}
    assert found["methods"]["warm"]["psnr"] == pytest.approx(found["methods"]["input"]["psnr"], abs=1e-3)  # untrained
    assert len(found["per_patient"]["local"]["psnr"]) == 2
    assert set(np.load(pictures)) == {"target", "input", "nlm", "warm", "local"}

    for made in (local, scores, pictures):  # all of them say something about patients
        assert stat.S_IMODE(made.stat().st_mode) == 0o600, made

    source, target = tmp_path / "sub-01_T1w.nii.gz", tmp_path / "out.nii.gz"
    head_image(2, (120, 132, 2), "PIR").to_filename(source)
    site_client("apply", source, target, "--site", hospital.root, "--head", local)
    assert np.array_equal(nib.load(target).affine, nib.load(source).affine)
    assert json.loads((tmp_path / "out.json").read_text())["Head"] == file_digest(local)
    assert not (hospital.root / "privacy").exists()  # nothing leaves, so nothing is charged


def test_apply_uses_the_current_head_where_there_is_one(site_client, hospital, tmp_path):
    source = tmp_path / "sub-01_T1w.nii.gz"
    head_image(2, (120, 132, 1)).to_filename(source)
    site_client("apply", source, tmp_path / "a.nii.gz", "--site", hospital.root)
    assert json.loads((tmp_path / "a.json").read_text())["Head"] == hospital.head
    current = save_module(
        hospital.root / "heads" / "current.safetensors", Head(MINI), MINI, "head", encoder_digest=hospital.encoder
    )
    site_client("apply", source, tmp_path / "b.nii.gz", "--site", hospital.root)
    assert json.loads((tmp_path / "b.json").read_text())["Head"] == current


def test_a_plan_gives_training_and_data(site_client, hospital, tmp_path):
    plan = {"run": "r", "encoder": hospital.encoder, "head": hospital.head, "rounds": 2,
            "local": {"steps": 2, "batch_slices": 1}}  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert "4 steps" in site_client("finetune", hospital.root, "--plan", tmp_path / "plan.yaml")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(plan | {"rouns": 3}))
    assert "rouns" in site_client("finetune", hospital.root, "--plan", tmp_path / "bad.yaml", status=2)
    assert "E-CONFIG" in site_client("finetune", hospital.root, "--plan", tmp_path / "gone.yaml", status=2)


def test_skipped_patients_are_told_to_the_operator(site_client, hospital):
    (hospital.data / "sub-01" / "anat" / "sub-01_T1w.nii.gz").write_bytes(b"broken")
    write_participants(hospital.data, {"sub-02": "yes"})
    said = site_client("finetune", hospital.root, "--steps", "1")
    assert "skipped sub-02: opted out" in said
    assert "sub-01_T1w.nii.gz" in said


def test_refusals(site_client, hospital, tmp_path):
    assert "E-CONFIG" in site_client("finetune", tmp_path / "nowhere", status=2)
    assert "FLAIR" in site_client("finetune", hospital.root, "--contrast", "FLAIR", status=2)
    assert "E-CONFIG" in site_client("evaluate", hospital.root, "--head", "local", status=2)
    assert "E-STATE" in site_client("evaluate", hospital.root, "--head", f"x={tmp_path / 'gone'}", status=2)
    assert "E-TENSORS" in site_client("evaluate", hospital.root, "--head", f"x={HEAD}", status=2)
    other = tmp_path / "other"
    save_module(other, Head(MINI), MINI, "head", encoder_digest="sha256:" + 64 * "f")
    assert "E-TENSORS" in site_client("evaluate", hospital.root, "--head", f"x={other}", status=2)
    source = tmp_path / "sub-02_T1w.nii.gz"
    head_image(2, (120, 132, 1)).to_filename(source)
    refused = ("apply", source, tmp_path / "o.nii.gz", "--site", hospital.root, "--head", other)
    assert "E-TENSORS" in site_client(*refused, status=2)
    scan = tmp_path / "sub-01_T1w.nii.gz"
    scan.write_bytes(b"")
    assert "E-DATA" in site_client("apply", scan, tmp_path / "o.nii", "--site", hospital.root, status=2)
    assert "exists" in site_client("apply", scan, scan, "--site", hospital.root, status=2)
    manifest = hospital.root / "store" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"demo"', b'"dema"'))
    assert "E-SIGNATURE" in site_client("finetune", hospital.root, status=2)


def test_a_hospital_that_never_joined_uses_the_packaged_weights(site_client, tmp_path):
    """From `init` to a better scan with nothing but the package: real preset, warped patients."""
    data, root = tmp_path / "data", tmp_path / "site"
    make_warped(data, "east", 3, seed=9, slices=1)
    site_client("init", root, "--name", "solo", "--data", data)
    site_client("finetune", root, "--steps", "1")
    site_client("evaluate", root, "--json", tmp_path / "s.json")
    methods = json.loads((tmp_path / "s.json").read_text())["methods"]
    assert methods["warm"]["psnr"] > methods["input"]["psnr"] + 2
    source = next(iter(sorted(data.glob("sub-*/anat/*_T1w.nii.gz"))))
    site_client("apply", source, tmp_path / "out.nii.gz", "--site", root)
    assert nib.aff2axcodes(nib.load(tmp_path / "out.nii.gz").affine) == ("L", "P", "S")
    assert json.loads((tmp_path / "out.json").read_text())["Encoder"] == file_digest(ENCODER)
    assert Path(root / "heads" / "local.safetensors").exists()
