"""NIfTI file to a canonical volume: array, affine and spacing, nothing else of the header."""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import aff2axcodes, apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError

from sspformer.contract.errors import Code, Refused

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it prints what it repairs; a refusal is one line

MAX_SPACING_MM = 4.0
MIN_SIDE = 32
MIN_GREY_LEVELS = 16
MAX_VOXELS = 2**29


@dataclass(frozen=True)
class Volume:
    """A scan brought to the closest canonical (RAS+) axes.

    `data` is float32 (X, Y, Z); `spacing_mm` its voxel size; `affine` its 4x4 matrix. `native_affine` and
    `native_shape` describe the file's own grid, so that an output can land on it.
    """

    data: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    native_affine: np.ndarray
    native_shape: tuple[int, ...]

    def to_native(self, data: np.ndarray) -> np.ndarray:
        """An array on the canonical grid (X, Y, Z), brought to the file's own axes and shape."""
        back = ornt_transform(axcodes2ornt(("R", "A", "S")), io_orientation(self.native_affine))
        return apply_orientation(data, back).reshape(self.native_shape)


def read_volume(path: Path) -> Volume:
    """Read one scan.

    Raises:
        Refused: E-DATA, one line naming the file and the reason: not NIfTI, truncated, 4D, structured voxels, not
            finite, constant, a label map, too coarse or too small.
    """
    data, affine = _read(path)
    native_shape = data.shape
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise _unusable(path, f"it has {len(native_shape)} dimensions ({'x'.join(map(str, native_shape))})",
                        "export one 3D volume per file.")  # fmt: skip
    if not _is_grid(affine):
        raise _unusable(path, "its affine is not invertible", "repair the header's orientation.")
    if not np.isfinite(data).all():
        raise _unusable(path, "it holds NaN or infinite voxels", "export it again from the scanner's archive.")
    if data.max() == data.min():
        raise _unusable(path, "all voxels are equal", "export it again from the scanner's archive.")
    if _grey_levels(data) < MIN_GREY_LEVELS:
        raise _unusable(path, f"it has fewer than {MIN_GREY_LEVELS} grey levels (a label map?)",
                        "name images, not labels, in anat/.")  # fmt: skip
    canonical = apply_orientation(data, io_orientation(affine))
    canonical_affine = affine @ nib.orientations.inv_ornt_aff(io_orientation(affine), data.shape)
    spacing = tuple(float(s) for s in np.sqrt((canonical_affine[:3, :3] ** 2).sum(axis=0)))
    volume = Volume(np.ascontiguousarray(canonical), canonical_affine, spacing, affine, native_shape)  # type: ignore[arg-type]
    in_plane = [i for i in range(3) if i != slice_axis(volume)]
    coarse = max(spacing[i] for i in in_plane)
    if coarse > MAX_SPACING_MM:
        raise _unusable(path, f"voxels of {coarse:.1f} mm in plane are too coarse (limit {MAX_SPACING_MM:.0f} mm)",
                        "use a scan of finer resolution.")  # fmt: skip
    if min(canonical.shape[i] for i in in_plane) < MIN_SIDE:
        raise _unusable(path, f"a slice is smaller than {MIN_SIDE} px", "use a larger field of view.")
    return volume


def slice_axis(volume: Volume) -> int:
    """The canonical axis across slices: the one with the thickest voxels, or the fewest of them; axial on a tie."""
    spacing, shape = volume.spacing_mm, volume.data.shape
    thickest = max(spacing)
    if thickest > 1.5 * min(spacing):
        return max((2, 1, 0), key=lambda axis: spacing[axis])
    fewest = min(shape)
    return min((2, 1, 0), key=lambda axis: shape[axis]) if fewest * 4 < max(shape) else 2


def orientation(volume: Volume) -> str:
    """The file's own axes, as in ``LPS``."""
    return "".join(str(code) for code in aff2axcodes(volume.native_affine))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):  # Nifti2Image and Nifti1Pair are subclasses or converted below
            raise _unusable(path, "it is not a NIfTI file", "convert it with dcm2niix.")
        if image.get_data_dtype().fields is not None or image.get_data_dtype().kind == "c":
            raise _unusable(path, "its voxels are colours or complex numbers", "export one magnitude image.")
        if np.prod(image.shape, dtype=np.float64) > MAX_VOXELS:
            raise _unusable(path, f"it declares more than {MAX_VOXELS} voxels", "check the header's dimensions.")
        affine = np.asarray(image.affine, dtype=np.float64)
        with np.errstate(all="ignore"):  # values beyond float32 become infinite, and are refused as such
            return np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")), affine
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise _unusable(path, f"it cannot be read as NIfTI ({type(error).__name__}: truncated or damaged?)",
                        "copy or export it again.") from error  # fmt: skip


def _is_grid(affine: np.ndarray) -> bool:
    # Finite is not enough: two axes that are almost parallel leave an axis without an orientation.
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        return False
    return bool(np.isfinite(io_orientation(affine)).all())


def _grey_levels(data: np.ndarray) -> int:
    # A thin sample is enough: labels repeat, images do not.
    flat = data.ravel()
    return len(np.unique(flat[:: max(1, flat.size // 100_000)]))


def _unusable(path: Path, reason: str, next_step: str) -> Refused:
    return Refused(Code.DATA, f"{path} is not usable: {reason}.", next_step)
