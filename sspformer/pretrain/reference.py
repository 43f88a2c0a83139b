"""Makes the packaged reference weights from MRI that pip brings: nilearn's MNI152 brain and nibabel's example scan."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from sspformer.checkpoint import file_digest, load_encoder, save_module
from sspformer.data.cache import FeatureCache
from sspformer.data.cohort import open_cohort
from sspformer.data.mni import Scanner, make_patient
from sspformer.data.slices import cut_slices
from sspformer.data.volume import read_volume
from sspformer.finetune import gradient_rms, train
from sspformer.model.assembly import Head, architecture
from sspformer.pretrain.loop import Recipe, collect_slices, pretrain
from sspformer.tasks.denoise import Denoise

SUFFIXES = ("T1w", "T2w", "FLAIR")


@dataclass(frozen=True)
class ReferenceRecipe:
    """What goes into the reference weights: patients to warp, and how long to train the encoder and the warm head."""

    preset: str = "tiny"
    patients: int = 400
    slices: int = 4
    encoder: Recipe = field(default_factory=Recipe)
    head_steps: int = 1000
    head_batch: int = 8
    head_learning_rate: float = 2e-3
    noise_sigma: float = 0.10
    seed: int = 2026


def random_scanner(rng: np.random.Generator) -> Scanner:
    """A scanner drawn over wide ranges, so that no hospital's own settings are learnt by heart."""
    return Scanner(
        grey=rng.uniform(-0.4, 0.4),
        white=rng.uniform(-0.6, 0.2),
        fluid=rng.uniform(-0.1, 1.0),
        scalp=rng.uniform(0.3, 2.0),
        texture=rng.uniform(0.02, 0.06),
        texture_mm=rng.uniform(1.5, 3.0),
        blur_mm=0.0,
        bias=rng.uniform(0.0, 0.3),
        noise=rng.uniform(0.0, 0.01),
        pixel_mm=rng.uniform(0.9, 1.15),
        thickness_mm=5.0,
        axes="RAS",
    )


def make_reference(
    recipe: ReferenceRecipe, work: Path, target: Path, say: Callable[[str, int, int], None]
) -> tuple[Path, Path]:
    """Make encoder and warm head.

    Args:
        recipe: all numbers.
        work: folder for data, cache and resumable state.
        target: folder that receives the two files.
        say: called with (stage, done, total).

    Returns:
        Paths of the encoder and of the head.
    """
    arch = architecture(recipe.preset)
    data = work / "data"
    _write_patients(data, recipe, say)
    slices = collect_slices([data], SUFFIXES, arch.size_px, recipe.slices, lambda done: say("slices", done, 0))
    slices = np.concatenate([slices, _example_slices(arch.size_px)])
    built = pretrain(
        arch,
        slices,
        recipe.encoder,
        work / "encoder",
        torch.device("cpu"),
        lambda step, loss: say(f"encoder loss {loss:.4f}", step, recipe.encoder.steps),
    )
    target.mkdir(parents=True, exist_ok=True)
    encoder_path = target / "encoder.safetensors"
    encoder_path.write_bytes(built.read_bytes())
    encoder, _ = load_encoder(encoder_path)
    task = Denoise(recipe.noise_sigma)
    digest = file_digest(encoder_path)
    cache = FeatureCache(work / "cache", encoder, digest, task, arch.size_px, recipe.slices)
    cohort = open_cohort(data, SUFFIXES, cache, progress=lambda done, total: say("features", done, total))
    torch.manual_seed(recipe.seed)
    head = Head(arch)
    train(head, cohort, task, steps=recipe.head_steps, batch_slices=recipe.head_batch,
          learning_rate=recipe.head_learning_rate, trainable="head", seed=recipe.seed,
          on_step=lambda step, loss: say(f"head loss {loss:.5f}", step, recipe.head_steps))  # fmt: skip
    head_path = target / "head-denoise.safetensors"
    sizes = gradient_rms(head, cohort, task)
    save_module(head_path, head, arch, "head", gradient_rms=sizes, encoder_digest=digest)
    return encoder_path, head_path


def _write_patients(folder: Path, recipe: ReferenceRecipe, say: Callable[[str, int, int], None]) -> None:
    rng = np.random.Generator(np.random.PCG64(recipe.seed))
    for i in range(recipe.patients):
        scanner, suffix = random_scanner(rng), SUFFIXES[int(rng.integers(len(SUFFIXES)))]
        path = folder / f"sub-R{i:04d}" / "anat" / f"sub-R{i:04d}_{suffix}.nii.gz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make_patient(scanner, recipe.seed * 1_000_003 + i, recipe.slices).to_filename(path)
        say("patients", i + 1, recipe.patients)


def _example_slices(size_px: int) -> np.ndarray:
    """The first frame of nibabel's example scan, one real subject."""
    import nibabel.tests.data as example_data

    source = nib.load(Path(example_data.__path__[0]) / "example4d.nii.gz")
    frame = nib.Nifti1Image(np.asarray(source.dataobj[..., 0]), source.affine)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frame.nii.gz"
        frame.to_filename(path)
        stack = cut_slices(read_volume(path), size_px, 24)
    return (stack.images * 255).round().astype(np.uint8)
