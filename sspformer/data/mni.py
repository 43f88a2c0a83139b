"""Hospitals made from one real brain: nilearn's MNI152 average T1 and its tissue maps, warped into patients.

For the demo, for tests on a fresh machine, and for the packaged reference weights. The patients are not different
people: they are one average brain, bent, re-contrasted, given fine texture, a bias field and noise. A result on them
says that the machinery works, nothing about patients.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt
from scipy import ndimage

from sspformer.contract.errors import Code, Refused


@dataclass(frozen=True)
class Scanner:
    """How one hospital's images differ.

    `grey`, `white`, `fluid`: shift of each tissue's intensity against the T1 average (1 = white matter); `scalp`: the
    intensity of the scalp, which the template lacks and which is drawn around the brain.
    `texture`, `texture_mm`: strength and scale of fine detail, which an average brain lacks.
    `blur_mm`: standard deviation of the in-plane blur: many scanners interpolate a coarser acquisition.
    `bias`: strength of the receive field. `noise`: standard deviation of the scanner's own noise.
    `pixel_mm`, `thickness_mm`, `axes`: the grid; axes as in nibabel.
    """

    grey: float
    white: float
    fluid: float
    scalp: float
    texture: float
    texture_mm: float
    blur_mm: float
    bias: float
    noise: float
    pixel_mm: float
    thickness_mm: float
    axes: str


SCANNERS = {
    "north": Scanner(0.0, 0.0, 0.0, 1.3, 0.03, 2.2, 0.9, 0.15, 0.005, 1.0, 5.0, "RAS"),
    "east": Scanner(0.25, -0.20, 0.10, 0.9, 0.04, 1.8, 0.8, 0.30, 0.007, 0.94, 4.0, "LPS"),
    "west": Scanner(0.10, -0.45, 0.70, 0.6, 0.03, 3.0, 1.1, 0.20, 0.010, 1.1, 6.0, "PIR"),
}


@lru_cache(maxsize=1)
def _template() -> tuple[np.ndarray, np.ndarray]:
    """(T1, grey, white, scalp, skull) as (5, X, Y, Z) float32 with T1 = 1 at white matter, and the affine.

    Scalp and skull are shells around the brain, by distance: the template is a brain alone, and a scan never is.
    """
    import nilearn.datasets

    folder = Path(nilearn.datasets.__file__).parent / "data"
    images = [nib.load(folder / f"mni_icbm152_{k}_tal_nlin_sym_09a_converted.nii.gz") for k in ("t1", "gm", "wm")]
    maps = np.stack([image.get_fdata(dtype=np.float32) for image in images])
    maps[1:] /= maps[1:].max(axis=(1, 2, 3), keepdims=True)
    maps[0] /= np.median(maps[0][maps[2] > 0.9])
    outside_mm = ndimage.distance_transform_edt(maps[0] <= 0.05)
    skull = ndimage.gaussian_filter(((outside_mm > 0) & (outside_mm <= 7)).astype(np.float32), 0.7)
    scalp = ndimage.gaussian_filter(((outside_mm > 7) & (outside_mm <= 13)).astype(np.float32), 0.7)
    return np.concatenate([maps, scalp[None], skull[None]]), images[0].affine


def make_patient(scanner: Scanner, seed: int, slices: int) -> nib.Nifti1Image:
    """One patient's axial slab.

    Args:
        scanner: the hospital.
        seed: decides anatomy, texture, field and noise.
        slices: slices in the slab.

    Returns:
        An int16 image on the scanner's own grid and axes.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 152]))
    maps, affine = _template()
    nx, ny = round(200 / scanner.pixel_mm), round(240 / scanner.pixel_mm)
    bottom = rng.uniform(-25, 45 - (slices - 1) * scanner.thickness_mm)
    grid_affine = np.diag([scanner.pixel_mm, scanner.pixel_mm, scanner.thickness_mm, 1.0])
    grid_affine[:3, 3] = (-100, -138, bottom)
    index = np.indices((nx, ny, slices), dtype=np.float32).reshape(3, -1)
    world = grid_affine[:3, :3].astype(np.float32) @ index + grid_affine[:3, 3:].astype(np.float32)
    world = _bend(world, rng)
    voxel = np.linalg.inv(affine)[:3] @ np.vstack([world, np.ones_like(world[:1])])
    t1, grey, white, scalp, skull = (ndimage.map_coordinates(m, voxel, order=1).reshape(nx, ny, slices) for m in maps)
    fluid = np.clip(1 - grey - white, 0, 1) * (ndimage.gaussian_filter(grey + white, 3) > 0.3)
    image = t1 + scanner.grey * grey + scanner.white * white + scanner.fluid * fluid
    image += scanner.scalp * scalp + 0.12 * skull
    sigma = [scanner.texture_mm / scanner.pixel_mm] * 2 + [0]
    detail = rng.standard_normal(image.shape, dtype=np.float32)
    detail = ndimage.gaussian_filter(detail, [s * 0.6 for s in sigma]) - ndimage.gaussian_filter(detail, sigma)
    image *= 1 + scanner.texture * detail / detail.std()
    image = ndimage.gaussian_filter(image, [scanner.blur_mm / scanner.pixel_mm] * 2 + [0])
    field = ndimage.zoom(rng.standard_normal((4, 4, 2)), (nx / 4, ny / 4, slices / 2), order=1)
    image *= np.exp(scanner.bias * ndimage.gaussian_filter(field, (20, 20, 1)))
    real, imaginary = rng.standard_normal((2, *image.shape), dtype=np.float32) * np.float32(scanner.noise)
    image = np.hypot(np.maximum(image, 0) + real, imaginary)
    stored = np.clip(np.round(image * 1000), 0, 32767).astype(np.int16)
    canonical = nib.Nifti1Image(stored, grid_affine)
    return canonical.as_reoriented(nib.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(scanner.axes)))


def _bend(world_3N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another anatomy: a random affine and a smooth displacement of a few millimetres."""
    angles = np.deg2rad(rng.uniform(-6, 6, 3))
    matrix = np.diag(rng.uniform(0.92, 1.08, 3))
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ turn
    moved = (matrix @ world_3N + rng.uniform(-4, 4, (3, 1))).astype(np.float32)
    coarse = ndimage.gaussian_filter(rng.standard_normal((3, 24, 28, 24)), (0, 2.2, 2.2, 2.2))
    coarse *= 3.5 / coarse.std()
    place = (moved + np.array([[110], [140], [90]])) / 10.0
    return moved + np.stack([ndimage.map_coordinates(c, place, order=1, mode="nearest") for c in coarse]).astype(
        np.float32
    )


def make_hospital(
    folder: Path,
    hospital: str,
    patients: int,
    seed: int = 0,
    slices: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a BIDS dataset of warped patients.

    Args:
        folder: root of the dataset; must not hold one already.
        hospital: a name of `SCANNERS`.
        patients: how many.
        seed: decides all of them.
        slices: slices per patient.
        progress: called with (patients done, patients in all).

    Raises:
        Refused: E-CONFIG for an unknown hospital, E-STATE where the folder is not empty.
    """
    if hospital not in SCANNERS:
        raise Refused(Code.CONFIG, f"unknown hospital {hospital!r}.", f"choose one of {', '.join(SCANNERS)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(Code.STATE, f"{folder} is not an empty folder.", "choose a new folder.")
    number = list(SCANNERS).index(hospital)
    names = [f"sub-{hospital[0].upper()}{i:04d}" for i in range(1, patients + 1)]
    for i, name in enumerate(names):
        progress(i, patients)
        anat = folder / name / "anat"
        anat.mkdir(parents=True)
        image = make_patient(SCANNERS[hospital], seed * 1_000_003 + number * 100_003 + i, slices)
        image.to_filename(anat / f"{name}_T1w.nii.gz")
    progress(patients, patients)
    description = {"Name": f"Warped MNI152, hospital {hospital}: not different people", "BIDSVersion": "1.9.0",
                   "DatasetType": "raw", "License": "MNI ICBM152 licence"}  # fmt: skip
    (folder / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n")
    with (folder / "participants.tsv").open("w", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(["participant_id", "opt_out"])
        writer.writerows([name, "no"] for name in names)
