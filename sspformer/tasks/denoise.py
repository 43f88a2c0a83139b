"""Denoising: Rician noise on a magnitude slice, and how well it is taken off again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from skimage.metrics import structural_similarity
from skimage.restoration import denoise_nl_means
from torch import Tensor

OUTSIDE_WEIGHT = 0.1


@dataclass(frozen=True)
class Denoise:
    """The denoising task.

    Args:
        noise_sigma: standard deviation of the noise in each of the two receiver channels, in units of intensity
            (1 = the 99.5th percentile of the foreground).
    """

    noise_sigma: float
    name = "denoise"

    def degrade(self, images_SHW: np.ndarray, seed: int) -> np.ndarray:
        """Rician noise: the magnitude of a complex signal with Gaussian noise in both channels; a seed fixes it."""
        rng = np.random.Generator(np.random.PCG64(seed))
        real, imaginary = rng.standard_normal((2, *images_SHW.shape), dtype=np.float32) * np.float32(self.noise_sigma)
        return np.hypot(images_SHW + real, imaginary)

    def loss(self, output_B1HW: Tensor, target_B1HW: Tensor, inside_B1HW: Tensor) -> Tensor:
        """Mean squared error, the head at full weight and air at a tenth of it."""
        weight = OUTSIDE_WEIGHT + (1 - OUTSIDE_WEIGHT) * inside_B1HW.to(output_B1HW.dtype)
        return (weight * (output_B1HW - target_B1HW) ** 2).sum() / weight.sum()


def scores(output_SHW: np.ndarray, target_SHW: np.ndarray, inside_SHW: np.ndarray) -> dict[str, float]:
    """PSNR (dB, peak 1) and SSIM of one patient's slices, inside the head and over whole slices.

    The squared error is pooled over the patient's slices before the logarithm, so that an easy slice cannot hide a bad
    one.
    """
    output = np.clip(output_SHW, 0, 1)
    error = (output - target_SHW) ** 2
    maps = [structural_similarity(o, t, data_range=1.0, full=True)[1] for o, t in zip(output, target_SHW, strict=True)]
    ssim = np.stack(maps)
    return {
        "psnr": _psnr(float(error[inside_SHW].mean())),
        "ssim": float(ssim[inside_SHW].mean()),
        "psnr_whole": _psnr(float(error.mean())),
        "ssim_whole": float(ssim.mean()),
    }


def non_local_means(base_SHW: np.ndarray, noise_sigma: float) -> np.ndarray:
    """Non-local means with the noise level known, and the Rician bias taken off: the classical alternative."""
    smooth = [
        denoise_nl_means(b, patch_size=5, patch_distance=6, h=0.8 * noise_sigma, sigma=noise_sigma, fast_mode=True)
        for b in base_SHW
    ]
    return np.sqrt(np.maximum(np.stack(smooth) ** 2 - noise_sigma**2, 0)).astype(np.float32)


def restore(head: torch.nn.Module, features_SND: Tensor, base_SHW: np.ndarray) -> np.ndarray:
    """Output slices (S, H, W) of a head, one at a time to bound memory."""
    device = next(head.parameters()).device
    with torch.inference_mode():
        slices = [
            head(f[None].to(device).float(), torch.from_numpy(b)[None, None].to(device).float())[0, 0].cpu().numpy()
            for f, b in zip(features_SND, base_SHW.astype(np.float32), strict=True)
        ]
    return np.stack(slices)


def _psnr(mean_squared_error: float) -> float:
    return float(-10 * np.log10(max(mean_squared_error, 1e-12)))
