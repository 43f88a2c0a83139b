"""Slim head and tokeniser: slices become tokens (SSPFormer, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Two 3x3 convolutions, a factorised patch tokeniser, and a learnt position per patch.

    The tokeniser is two 4x4 convolutions of stride 4 (32 -> 30 -> D): with the slim head that is 211,102 parameters at
    D = 384, the 0.21 M of the paper.

    Args:
        channels: contrasts, stacked as channels.
        width: token width D.
        grid: patches per side for which positions are learnt; other sizes are interpolated.
    """

    patch = 16

    def __init__(self, channels: int, width: int, grid: int) -> None:
        super().__init__()
        self.slim_head = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 32, 3, padding=1), nn.GELU()
        )
        self.tokeniser = nn.Sequential(nn.Conv2d(32, 30, 4, stride=4), nn.GELU(), nn.Conv2d(30, width, 4, stride=4))
        self.position = nn.Parameter(torch.randn(1, width, grid, grid) * 0.02)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Tokens of shape (B, N, D) with positions added; H and W must be multiples of 16."""
        tokens_BDgg = self.tokeniser(self.slim_head(x_BCHW))
        return (tokens_BDgg + resize_positions(self.position, tokens_BDgg.shape[-2:])).flatten(2).transpose(1, 2)


def resize_positions(position_1Dgg: Tensor, grid: torch.Size | tuple[int, ...]) -> Tensor:
    """Positions for another grid of patches, by bicubic interpolation; unchanged where the grid is the same."""
    if tuple(position_1Dgg.shape[-2:]) == tuple(grid):
        return position_1Dgg
    return F.interpolate(position_1Dgg, size=tuple(grid), mode="bicubic", align_corners=False)
