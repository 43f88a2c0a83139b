"""A real site without a coordinator: made by `site-client init`, with a key pinned and artifacts in its store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from site_client.join import create
from site_client.site import Site
from sspformer.checkpoint import save_module
from sspformer.contract.keys import save_public
from sspformer.contract.plan import RunPlan
from sspformer.model.assembly import Head, build_encoder
from tests.phantom import MINI, write_dataset

PATIENTS = 9


@dataclass(frozen=True)
class Hospital:
    """A joined site's folder, its data, and the digests of what was published."""

    root: Path
    data: Path
    encoder: str
    head: str

    def open(self) -> Site:
        return Site.open(self.root)

    def allow(self, **policy: object) -> None:
        """Change the site's own policy."""
        path = self.root / "site.yaml"
        settings = yaml.safe_load(path.read_text())
        settings["policy"] |= policy
        path.write_text(yaml.safe_dump(settings))

    def plan(self, **changes: object) -> RunPlan:
        facts = {"run": "test", "encoder": self.encoder, "head": self.head, "rounds": 2,
                 "local": {"steps": 3, "batch_slices": 2, "learning_rate": 2e-3}}  # fmt: skip
        return RunPlan.model_validate(facts | changes)

    def private_plan(self, **changes: object) -> RunPlan:
        private = {"sample_rate": 0.5, "expected_patients": 3.0, "noise_multiplier": 2.0, "clipping_norm": 0.5,
                   "steps": 2, "learning_rate": 0.05, "trainable": "norms"}  # fmt: skip
        return self.plan(private=private | changes)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder and a small untrained head."""
    folder = tmp_path_factory.mktemp("artifacts")
    torch.set_num_threads(1)
    torch.manual_seed(3)
    digest = save_module(folder / "encoder", build_encoder(MINI), MINI, "encoder", half=True)
    save_module(folder / "head", Head(MINI), MINI, "head", encoder_digest=digest)
    return folder


@pytest.fixture(scope="session")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset; copied for every hospital."""
    return write_dataset(tmp_path_factory.mktemp("patients") / "data", PATIENTS)


@pytest.fixture
def make_hospital(tmp_path: Path, artifacts: Path, patients: Path) -> Callable[..., Hospital]:
    def make(name: str = "alpha", **policy: object) -> Hospital:
        from sspformer.checkpoint import file_digest

        data, root = tmp_path / f"{name}-data", tmp_path / name
        shutil.copytree(patients, data)
        create(root, name=name, data=data, device="cpu")
        save_public(root / "keys" / "coordinator.pub", Ed25519PrivateKey.generate().public_key())
        digests = {role: file_digest(artifacts / role) for role in ("encoder", "head")}
        for role, digest in digests.items():
            shutil.copy(artifacts / role, root / "store" / digest.replace(":", "-"))
        hospital = Hospital(root, data, **digests)
        hospital.allow(**({"min_patients": 2} | policy))
        return hospital

    return make
