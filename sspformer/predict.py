"""Apply a head to a whole scan; the output lands on the scan's own grid."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

import sspformer
from sspformer.contract.durable import write_file
from sspformer.contract.errors import Code, Refused
from sspformer.data.bids import contrast_of
from sspformer.data.cache import encode
from sspformer.data.slices import cut_slices
from sspformer.data.volume import Volume, read_volume
from sspformer.model.assembly import Head
from sspformer.model.encoder import Encoder
from sspformer.tasks.denoise import restore

CLEAN = 0.03  # noise below which the head takes off more than noise


@dataclass(frozen=True)
class Prediction:
    """A restored scan.

    Attributes:
        data: float32 on the file's own axes and shape, in the file's own units of intensity.
        noise_sigma: noise estimated in the input, in units of the network (1 = 99.5th percentile of the foreground).
        resampled: whether slices had to be resampled on the way.
    """

    data: np.ndarray
    volume: Volume
    noise_sigma: float
    resampled: bool


def predict(
    path: Path,
    encoder: Encoder,
    head: Head,
    contrast: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prediction:
    """Restore every slice of a scan. What the network's grid does not cover keeps its input value.

    Args:
        path: a 3D NIfTI file.
        encoder: the frozen encoder.
        head: decoder and tail.
        contrast: BIDS suffix; None takes it from the file's name.
        progress: called with (slices done, slices in all).

    Raises:
        Refused: E-DATA where the file cannot be used, or its contrast is unknown.
    """
    volume = read_volume(path)
    contrast = contrast or contrast_of(path)
    if contrast is None:
        raise Refused(Code.DATA, f"the contrast of {path.name} cannot be told from its name.", "give --contrast T1w.")
    stack = cut_slices(volume, keep_pixels=True)
    geometry = stack.geometry
    output = np.moveaxis(volume.data.copy(), geometry.axis, 0)
    for done, (index, image) in enumerate(zip(stack.indices, stack.images, strict=True)):
        progress(done, len(stack.indices))
        restored = restore(head, encode(encoder, image[None], contrast), image[None])[0]
        intensity = np.clip(restored, 0, 1) * stack.scale + stack.floor
        back, covered = geometry.backward(intensity, output[index].shape)
        # Beyond what became 0 and 1 the network saw a clipped value: such voxels keep their own.
        keep = covered & (output[index] >= stack.floor) & (output[index] <= stack.floor + stack.scale)
        output[index][keep] = back[keep]
    progress(len(stack.indices), len(stack.indices))
    data = volume.to_native(np.moveaxis(output, 0, geometry.axis))
    return Prediction(data, volume, estimate_noise(stack.images), geometry.step != (1.0, 1.0))


def save_prediction(prediction: Prediction, source: Path, target: Path, description: dict[str, object]) -> None:
    """Write a prediction as a BIDS derivative: the image, and a JSON sidecar that says how it was made.

    The image carries the source's affine and nothing else of its header. A file that appears is whole.

    Args:
        prediction: what to write.
        source: the input file; only its name is written.
        target: ``*.nii.gz`` or ``*.nii``; must not exist.
        description: extra facts for the sidecar (digests, task).

    Raises:
        Refused: E-STATE where the target exists, is not a NIfTI name, or cannot be written.
    """
    check_target(target)
    image = nib.Nifti1Image(prediction.data.astype(np.float32), prediction.volume.native_affine)
    image.header.set_xyzt_units("mm")
    ending = ".nii.gz" if target.name.endswith(".nii.gz") else ".nii"
    sidecar = {
        "Description": "Denoised with a frozen SSPFormer encoder and a fine-tuned head; not for diagnosis",
        "Sources": [source.name],
        "GeneratedBy": [{"Name": "sspformer-onsite", "Version": sspformer.__version__}],
        "Resampled": prediction.resampled,
        "EstimatedInputNoise": round(prediction.noise_sigma, 4),
        **description,
    }
    temporary = target.with_name(f".{os.getpid()}{ending}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.to_filename(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        # The image first: whatever ends this process in between, an image that is there is whole.
        os.replace(temporary, target)
        write_file(_sidecar_path(target), (json.dumps(sidecar, indent=2) + "\n").encode())
    except OSError as error:
        for path in (temporary, target):
            with suppress(OSError):
                path.unlink()
        raise Refused(
            Code.STATE, f"{target} cannot be written ({error.strerror}).", "check folder and space."
        ) from error


def advice(prediction: Prediction) -> list[str]:
    """A line of warning where the scan is much cleaner than what the head was trained for; else nothing."""
    if prediction.noise_sigma >= CLEAN:
        return []
    return [
        f"  The input's noise is about {prediction.noise_sigma:.3f}; the head was trained for 0.10 and may smooth away "
        "fine detail of so clean a scan."
    ]


def check_target(target: Path) -> None:
    """Refuse a target that exists, or its sidecar, or that is not named like NIfTI, before any work is done.

    Raises:
        Refused: E-STATE.
    """
    if not target.name.endswith((".nii", ".nii.gz")):
        raise Refused(Code.STATE, f"{target} does not end in .nii or .nii.gz.", "name the output so.")
    for path in (target, _sidecar_path(target)):
        if path.exists() or path.is_symlink():
            raise Refused(Code.STATE, f"{path} exists already.", "choose another name, or remove it.")


def _sidecar_path(target: Path) -> Path:
    return target.with_name(target.name.removesuffix(".gz").removesuffix(".nii") + ".json")


def estimate_noise(images_SHW: np.ndarray) -> float:
    """Standard deviation of the noise: the median over slices of a robust Laplacian estimate (Immerkaer 1996)."""
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
    estimates = []
    for image in images_SHW:
        bright = image > 0.2
        if bright.sum() > 500:
            response = ndimage.convolve(image, kernel)[bright]
            estimates.append(np.median(np.abs(response)) / 0.6745 / 6)
    return float(np.median(estimates)) if estimates else 0.0
