"""Foreground tokens and Instance-Centre Norm (SSPFormer, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def otsu_threshold(values_BN: Tensor) -> Tensor:
    """Otsu's threshold of each row, exact over the values themselves.

    Args:
        values_BN: one row of samples per image.

    Returns:
        Thresholds of shape (B, 1): the midpoint of the split with the largest between-class variance.
    """
    sorted_BN, _ = values_BN.sort(dim=1)
    n = sorted_BN.shape[1]
    low_count = torch.arange(1, n, device=values_BN.device, dtype=values_BN.dtype)
    cumulative = sorted_BN.cumsum(dim=1)
    low_mean = cumulative[:, :-1] / low_count
    high_mean = (cumulative[:, -1:] - cumulative[:, :-1]) / (n - low_count)
    between = low_count * (n - low_count) * (high_mean - low_mean) ** 2
    split = between.argmax(dim=1, keepdim=True)
    return (sorted_BN.gather(1, split) + sorted_BN.gather(1, split + 1)) / 2


def foreground_tokens(x_BCHW: Tensor, patch: int) -> Tensor:
    """Which patches hold tissue, judged from the (degraded) input alone.

    The threshold sits half-way between the mean of the darkest 5% of patches and Otsu's threshold, so that a noise
    floor (Rician background is not zero) stays below it. An image with fewer than max(2, N/100) such patches has no
    usable foreground: all of its patches count.

    Args:
        x_BCHW: input slices; absent contrasts are zero channels.
        patch: side of a patch in pixels.

    Returns:
        Boolean mask of shape (B, N), N patches in row-major order.
    """
    means_BN = F.avg_pool2d(x_BCHW.float().amax(dim=1, keepdim=True), patch).flatten(1)
    n = means_BN.shape[1]
    darkest = means_BN.sort(dim=1).values[:, : max(1, n // 20)].mean(dim=1, keepdim=True)
    threshold = darkest + 0.5 * (otsu_threshold(means_BN) - darkest)
    mask_BN = means_BN > threshold
    too_few = mask_BN.sum(dim=1, keepdim=True) < max(2, n / 100)
    return mask_BN | too_few


class InstanceCentreNorm(nn.Module):
    """(x - mean over foreground tokens) / (standard deviation over the slice + eps), section 3.1.

    The mean is taken per channel, the deviation over all tokens and channels of a slice. There are no parameters.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x_BND: Tensor, mask_BN: Tensor) -> Tensor:
        """Normalise tokens; shapes in and out are (B, N, D)."""
        weight_BN1 = mask_BN.unsqueeze(-1).to(x_BND.dtype)
        centre_B1D = (x_BND * weight_BN1).sum(dim=1, keepdim=True) / weight_BN1.sum(dim=1, keepdim=True)
        spread_B11 = x_BND.std(dim=(1, 2), keepdim=True, correction=0)
        return (x_BND - centre_B1D) / (spread_B11 + self.eps)
