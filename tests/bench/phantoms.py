"""Patients made of ellipsoids: enough to time with, never to judge quality by."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter


def make_dataset(folder: Path, patients: int, side: int = 112) -> Path:
    """A BIDS dataset of `patients` T1w volumes of side³ voxels of 2 mm."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 3, indexing="ij"))
    for number in range(patients):
        random = np.random.default_rng(number)
        axes = random.uniform(0.6, 0.8, 3)[:, None, None, None]
        radius = np.sqrt(((grid / axes) ** 2).sum(axis=0))
        texture = gaussian_filter(random.standard_normal((side,) * 3), 3)
        texture /= np.abs(texture).max()
        image = np.where(radius < 1, 400 + 250 * (radius < 0.85) + 200 * texture, 0) * (radius < 1)
        name = f"sub-{number:02d}"
        path = folder / name / "anat" / f"{name}_T1w.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return folder
