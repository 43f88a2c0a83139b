"""Task tails: decoder tokens and the degraded slice become the output slice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, GroupNorm (BatchNorm breaks under DP-SGD and under averaging), GELU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.GELU())


class InjectedTail(nn.Module):
    """A small convolutional encoder-decoder over `base`, with the decoder's tokens injected at 1/16, 1/8 and 1/4.

    `base` is read at full resolution, two by two pixels at a time (pixel-unshuffle), so that the widest maps are 112 px
    for a 224 px slice. The last layer starts at zero: an untrained head returns exactly `base`.

    Args:
        tokens: width d of the decoder's tokens.
        widths: channels at 1/2, 1/4, 1/8 and 1/16 of the slice.
    """

    def __init__(self, tokens: int, widths: tuple[int, int, int, int] = (16, 32, 64, 48)) -> None:
        super().__init__()
        w2, w4, w8, w16 = widths
        self.down2 = nn.Sequential(_conv(4, w2), _conv(w2, w2))
        self.down4 = nn.Sequential(_conv(w2, w4), _conv(w4, w4))
        self.down8 = nn.Sequential(_conv(w4, w8), _conv(w8, w8))
        self.inject16 = nn.Conv2d(tokens, w16, 1)
        self.inject8 = nn.Conv2d(tokens, w8 // 4, 1)
        self.inject4 = nn.Conv2d(tokens, w4 // 4, 1)
        self.bottom = _conv(w8 + w16, w16)
        self.up8 = _conv(w16 + w8 + w8 // 4, w8)
        self.up4 = _conv(w8 + w4 + w4 // 4, w4)
        self.up2 = _conv(w4 + w2, w2)
        self.last = nn.Conv2d(w2, 4, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, tokens_Bdgg: Tensor, base_B1HW: Tensor) -> Tensor:
        """The restored slice (B, 1, H, W): `base` plus a learnt residual."""
        x2 = self.down2(F.pixel_unshuffle(base_B1HW, 2))
        x4 = self.down4(F.avg_pool2d(x2, 2))
        x8 = self.down8(F.avg_pool2d(x4, 2))
        x = self.bottom(torch.cat([F.avg_pool2d(x8, 2), self.inject16(tokens_Bdgg)], dim=1))
        x = self.up8(torch.cat([_upsample(x, 2), x8, _upsample(self.inject8(tokens_Bdgg), 2)], dim=1))
        x = self.up4(torch.cat([_upsample(x, 2), x4, _upsample(self.inject4(tokens_Bdgg), 4)], dim=1))
        x = self.up2(torch.cat([_upsample(x, 2), x2], dim=1))
        return base_B1HW + F.pixel_shuffle(self.last(x), 2)


def _upsample(x: Tensor, factor: int) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class PaperTail(nn.Module):
    """The paper's literal tail: two 3x3 convolutions on the token grid and a pixel-shuffle; a switch for its ablation.

    Tokens have forgotten pixels, so this tail loses to any network that reads `base` at full resolution.
    """

    def __init__(self, tokens: int, patch: int = 16) -> None:
        super().__init__()
        self.patch = patch
        self.first = nn.Conv2d(tokens, 32, 3, padding=1)
        self.last = nn.Conv2d(32, patch * patch, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, tokens_Bdgg: Tensor, base_B1HW: Tensor) -> Tensor:
        """The restored slice (B, 1, H, W)."""
        return base_B1HW + F.pixel_shuffle(self.last(F.gelu(self.first(tokens_Bdgg))), self.patch)
