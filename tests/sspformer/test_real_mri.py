"""On real MRI: the packaged head denoises patients it has never seen, and a few steps at a hospital make it better."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from sspformer.checkpoint import file_digest, load_encoder, load_head
from sspformer.data.cache import FeatureCache
from sspformer.data.cohort import open_cohort
from sspformer.evaluate import evaluate
from sspformer.finetune import train
from sspformer.reference import ENCODER, HEAD
from sspformer.tasks.denoise import Denoise


def test_a_real_hospital_gains(shared_data: Path, tmp_path: Path) -> None:
    """Rician noise of 0.10 on real T1w scans; held-out patients, inside the head."""
    torch.set_num_threads(1)
    task, digest = Denoise(0.10), file_digest(ENCODER)
    encoder, arch = load_encoder(ENCODER)
    cache = FeatureCache(tmp_path / "cache", encoder, digest, task, arch.size_px, max_slices=3)
    cohort = open_cohort(shared_data / "hospital-a", ("T1w",), cache)
    warm, _ = load_head(HEAD, of=arch, encoder_digest=digest)
    tuned = copy.deepcopy(warm)
    train(tuned, cohort, task, steps=48, batch_slices=4, learning_rate=2e-3, trainable="head", seed=1)
    scored = evaluate(cohort, task, {"warm": warm, "tuned": tuned})
    assert 19.5 < scored.mean("input", "psnr") < 21.0
    assert scored.mean("warm", "psnr") > scored.mean("input", "psnr") + 4.5
    assert scored.mean("tuned", "psnr") > scored.mean("warm", "psnr") + 0.5
    assert scored.mean("tuned", "psnr") > scored.mean("nlm", "psnr")
