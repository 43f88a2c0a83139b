"""Volume to normalised 224 px slices, with the geometry recorded so that an output lands on the input's own grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from sspformer.data.volume import Volume, slice_axis

LARGEST_PX = 512
MIN_HEAD_SHARE = 0.04  # of a slice's pixels: thinner slices are the top of the skull or air


@dataclass(frozen=True)
class SliceGeometry:
    """How slices of a volume map to the network's square grid.

    A pixel (i, j) of the network's grid lies at ``start + step * (i, j)`` of the canonical slice, pixel centres on
    integers: an aligned grid, so nothing shifts by a fraction of a pixel. A step of exactly (1, 1) with an integer
    start is a crop: the way back is then exact.
    """

    axis: int
    start: tuple[float, float]
    step: tuple[float, float]
    size_px: int

    def forward(self, slice_2d: np.ndarray, order: int = 1) -> np.ndarray:
        """A canonical slice on the network's grid (size_px, size_px); zero outside."""
        # When the grid is coarser than the slice, low-pass first: otherwise fine detail folds into noise.
        sigma = [max(0.0, (step - 1) / 2) for step in self.step]
        source = ndimage.gaussian_filter(slice_2d, sigma) if any(sigma) else slice_2d
        return ndimage.affine_transform(
            source, np.array(self.step), self.start, (self.size_px, self.size_px), order=order, cval=0.0
        ).astype(np.float32)

    def backward(self, grid_2d: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """A grid back on the canonical slice.

        Returns:
            The slice of `shape`, and the boolean pixels that the grid covers.
        """
        inverse = np.array([1 / step for step in self.step])
        offset = [-start / step for start, step in zip(self.start, self.step, strict=True)]
        image = ndimage.affine_transform(grid_2d, inverse, offset, shape, order=1, mode="nearest")
        covered = [
            (np.arange(n) >= start - 1e-6) & (np.arange(n) <= start + step * (self.size_px - 1) + 1e-6)
            for n, start, step in zip(shape, self.start, self.step, strict=True)
        ]
        return image.astype(np.float32), np.outer(*covered)


@dataclass(frozen=True)
class SliceStack:
    """Normalised slices of one volume.

    Attributes:
        images: (S, size, size) float32, 0 = air, 1 = the 99.5th percentile of the foreground, clipped to [0, 1].
        head: (S, size, size) boolean, inside the head.
        indices: position of each slice along `geometry.axis`.
        scale: how far the intensity that became 1 lies above `floor`.
        floor: intensity that became 0: zero, or the level of air in a file with negative values.
    """

    images: np.ndarray
    head: np.ndarray
    indices: tuple[int, ...]
    geometry: SliceGeometry
    scale: float
    floor: float = 0.0


def head_mask(data: np.ndarray, axis: int) -> np.ndarray:
    """Boolean (X, Y, Z): inside the head.

    Above half of Otsu's threshold, closed and filled slice by slice (the skull is dark, the brain inside it counts),
    then the largest connected object.
    """
    smooth = ndimage.gaussian_filter(data, [0 if i == axis else 1.0 for i in range(3)])
    low, high = np.percentile(smooth, (0.5, 99.5))
    clipped = np.clip(smooth, low, high)
    threshold = low + 0.5 * (threshold_otsu(clipped.ravel()) - low) if high > low else low
    above = np.moveaxis(clipped > threshold, axis, 0)
    filled = np.stack([ndimage.binary_fill_holes(ndimage.binary_closing(one, iterations=2)) for one in above])
    labels, count = ndimage.label(np.moveaxis(filled, 0, axis))
    if count > 1:
        sizes = np.bincount(labels.ravel())
        return labels == 1 + int(np.argmax(sizes[1:]))
    return labels > 0


def cut_slices(
    volume: Volume, size_px: int = 224, max_slices: int | None = None, keep_pixels: bool = False
) -> SliceStack:
    """Cut a volume into normalised slices.

    Args:
        volume: a canonical volume.
        size_px: side of the network's grid.
        max_slices: take at most so many, evenly spaced over the head; None takes every slice of the volume.
        keep_pixels: grow the grid (in steps of 16 px, up to `LARGEST_PX`) rather than resample a large slice.

    Returns:
        The slices; empty only where no slice shows enough of the head and `max_slices` was given.
    """
    axis = slice_axis(volume)
    mask = head_mask(volume.data, axis)
    # Magnitudes are never negative, but files are: an intercept in the header, a z-score. Air is their zero then.
    floor = min(0.0, float(np.percentile(volume.data, 0.5)))
    values = volume.data[mask] - floor
    scale = float(np.percentile(values, 99.5)) if values.size else 0.0
    scale = scale if scale > 0 else float(volume.data.max()) - floor
    slices, heads = np.moveaxis(volume.data, axis, 0), np.moveaxis(mask, axis, 0)
    indices = np.arange(len(slices))
    if max_slices is not None:
        usable = indices[heads.mean(axis=(1, 2)) > MIN_HEAD_SHARE]
        indices = usable[_spread(len(usable), max_slices)]
    geometry = _geometry(volume, heads, axis, size_px, keep_pixels)
    size_px = geometry.size_px
    images = [np.clip(geometry.forward(slices[i] - floor) / scale, 0, 1) for i in indices]
    inside = [geometry.forward(heads[i].astype(np.float32)) > 0.5 for i in indices]
    empty = (0, size_px, size_px)
    return SliceStack(
        np.stack(images) if images else np.zeros(empty, np.float32),
        np.stack(inside) if inside else np.zeros(empty, bool),
        tuple(int(i) for i in indices),
        geometry,
        scale,
        floor,
    )


def _spread(count: int, at_most: int) -> np.ndarray:
    """Evenly spaced positions among `count`, the two ends left out where there are enough; none is taken twice."""
    if count >= at_most + 2:
        return np.linspace(0, count - 1, at_most + 2)[1:-1].round().astype(int)
    return np.linspace(0, max(0, count - 1), min(count, at_most)).round().astype(int)


def _geometry(volume: Volume, heads: np.ndarray, axis: int, size_px: int, keep_pixels: bool) -> SliceGeometry:
    """Centre the head's bounding box; resample only where voxels are not square, or the box does not fit or is tiny."""
    spacing = [volume.spacing_mm[i] for i in range(3) if i != axis]
    shape = heads.shape[1:]
    seen = heads.any(axis=0)
    box = [np.flatnonzero(seen.any(axis=1 - i)) for i in range(2)]
    low = [float(b[0]) if len(b) else 0.0 for b in box]
    high = [float(b[-1]) if len(b) else shape[i] - 1.0 for i, b in enumerate(box)]
    extent_mm = [(high[i] - low[i] + 1) * spacing[i] for i in range(2)]
    square = max(spacing) <= 1.02 * min(spacing)
    pixels = max(high[i] - low[i] + 1 for i in range(2))
    if keep_pixels and pixels <= LARGEST_PX:
        size_px = max(size_px, 16 * int(np.ceil(pixels / 16)))
    if square and size_px / 2 <= pixels <= size_px:
        step = (1.0, 1.0)
    else:
        pixel_mm = max(extent_mm) / (size_px - 8)
        step = (pixel_mm / spacing[0], pixel_mm / spacing[1])
    centre = [(low[i] + high[i]) / 2 for i in range(2)]
    start = tuple(centre[i] - step[i] * (size_px - 1) / 2 for i in range(2))
    if step == (1.0, 1.0):
        start = tuple(float(np.floor(s)) for s in start)
    return SliceGeometry(axis, (start[0], start[1]), step, size_px)
