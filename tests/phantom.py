"""Small made-up heads for tests: quick to make, with tissue, a skull, fine texture and a little noise of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from sspformer.model.assembly import Architecture

MINI = Architecture(
    "mini", width=32, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, size_px=64
)  # fmt: skip


def head_array(seed: int = 0, shape: tuple[int, int, int] = (56, 60, 4)) -> np.ndarray:
    """A head (X, Y, Z) in uint16, each slice different; nothing in it is symmetric."""
    rng = np.random.default_rng(seed)
    x, y, z = np.indices(shape, dtype=np.float32)
    cx, cy = shape[0] / 2 + rng.uniform(-2, 2), shape[1] / 2 + rng.uniform(-2, 2)
    radius = np.hypot((x - cx) / (0.44 * shape[0]), (y - cy) / (0.46 * shape[1])) + 0.02 * z
    image = np.where(radius < 1, 700.0, 0.0)  # scalp
    image[(radius < 0.9) & (radius >= 0.8)] = 90  # skull
    image[radius < 0.8] = 420  # grey matter
    image[radius < 0.6] = 640  # white matter
    image[np.hypot(x - cx - 6, y - cy + 4) < 5] = 150  # a ventricle on one side only
    detail = ndimage.gaussian_filter(rng.standard_normal(shape), (0.7, 0.7, 0))
    image *= 1 + 0.12 * detail / detail.std()
    return np.clip(image + rng.normal(0, 6, shape), 0, 4000).astype(np.uint16)


def head_image(seed: int = 0, shape: tuple[int, int, int] = (56, 60, 4), axes: str = "RAS") -> nib.Nifti1Image:
    """The head as an image with 3 x 3 x 6 mm voxels, stored along other axes where asked."""
    affine = np.diag([3.0, 3.0, 6.0, 1.0])
    affine[:3, 3] = (-80, -90, -10)
    image = nib.Nifti1Image(head_array(seed, shape), affine)
    to = nib.orientations.axcodes2ornt(axes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), to))


def write_scan(
    folder: Path, subject: str, suffix: str = "T1w", seed: int = 0, session: str = "", **image: object
) -> Path:
    """One subject's scan in a BIDS dataset."""
    place = folder / subject / session / "anat"
    place.mkdir(parents=True, exist_ok=True)
    middle = f"_{session}" if session else ""
    path = place / f"{subject}{middle}_{suffix}.nii.gz"
    head_image(seed, **image).to_filename(path)  # type: ignore[arg-type]
    return path


def write_dataset(folder: Path, patients: int, opted_out: tuple[str, ...] = ()) -> Path:
    """A BIDS dataset of `patients` heads, sub-00 to sub-NN, and its participants.tsv."""
    names = [f"sub-{i:02d}" for i in range(patients)]
    for i, name in enumerate(names):
        write_scan(folder, name, seed=i)
    write_participants(folder, {name: "yes" if name in opted_out else "no" for name in names})
    return folder


def write_participants(folder: Path, opt_outs: dict[str, str]) -> None:
    """participants.tsv with an opt_out column."""
    rows = "".join(f"{name}\t{value}\n" for name, value in opt_outs.items())
    (folder / "participants.tsv").write_text("participant_id\topt_out\n" + rows)


def run_command(main: Callable[[], None], *arguments: object) -> int:
    """Run a command line in this process as its entry point would; returns the exit status."""
    before = sys.argv
    sys.argv = ["command", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0
