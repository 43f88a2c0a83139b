"""The encoder: Instance-Centre Norm, self-attention and the frequency-gated feed-forward (SSPFormer, section 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sspformer.model.attention import Attention
from sspformer.model.embed import Embedding
from sspformer.model.norm import InstanceCentreNorm, foreground_tokens

Gate = Literal["radial", "literal"]
RADIAL_BINS = 11


class FrequencyGate(nn.Module):
    """The gate of the FG-FFN: a sigmoid of the tokens, filtered in the frequency domain.

    ``radial`` computes sigma(a * IFFT(w_r * |F| * F / mean|F|) + b): emphasis by magnitude, shaped by one learnt weight
    per channel and radial frequency, phase kept. ``literal`` is the paper's sigma(IFFT(|F|)), which has no parameters
    and loses the phase. The FFT runs in float32, under autocast too.
    """

    def __init__(self, width: int, kind: Gate) -> None:
        super().__init__()
        self.kind = kind
        if kind == "radial":
            self.radial = nn.Parameter(torch.ones(width, RADIAL_BINS))
            self.scale = nn.Parameter(torch.full((width,), 0.5))
            self.offset = nn.Parameter(torch.ones(width))

    def forward(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Gate values in (0, 1), shape (B, N, D), for tokens that form a grid of patches."""
        with torch.autocast(device_type=x_BND.device.type, enabled=False):
            x_BDgg = x_BND.float().transpose(1, 2).unflatten(2, grid)
            spectrum = torch.fft.rfft2(x_BDgg)
            magnitude = spectrum.abs()
            if self.kind == "literal":
                mixed = torch.fft.irfft2(magnitude.to(spectrum.dtype), s=grid)
            else:
                relative = magnitude / (magnitude.mean(dim=(2, 3), keepdim=True) + 1e-6)
                weight_Dgh = self.radial.float()[:, radial_bins(grid, x_BND.device)]
                filtered = torch.fft.irfft2(weight_Dgh * relative * spectrum, s=grid)
                mixed = self.scale.float()[:, None, None] * filtered + self.offset.float()[:, None, None]
            return torch.sigmoid(mixed).flatten(2).transpose(1, 2).to(x_BND.dtype)


def radial_bins(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Bin of each half-plane frequency by its distance from zero frequency; the scale is the same for every grid."""
    fy = torch.fft.fftfreq(grid[0], device=device)[:, None]
    fx = torch.fft.rfftfreq(grid[1], device=device)[None, :]
    return ((fy**2 + fx**2).sqrt() / 0.5**0.5 * (RADIAL_BINS - 1)).round().long()


class EncoderBlock(nn.Module):
    """x + MSA(ICN(x)), then x + FFN(ICN(x)) * gate(ICN(x))."""

    def __init__(self, width: int, heads: int, gate: Gate) -> None:
        super().__init__()
        self.norm = InstanceCentreNorm()
        self.attention = Attention(width, heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gate = FrequencyGate(width, gate)

    def forward(self, x_BND: Tensor, mask_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        """One block; shapes in and out are (B, N, D)."""
        normal = self.norm(x_BND, mask_BN)
        x_BND = x_BND + self.attention(normal, normal)
        normal = self.norm(x_BND, mask_BN)
        return x_BND + self.feed_forward(normal) * self.gate(normal, grid)


class Encoder(nn.Module):
    """Slices to features; frozen at every hospital.

    Args:
        channels: contrasts, stacked as channels (6 in the paper).
        width: token width D.
        depth: number of blocks L.
        heads: attention heads.
        grid: patches per side at the training size (14 for 224 px).
        gate: see `FrequencyGate`.
    """

    def __init__(self, channels: int, width: int, depth: int, heads: int, grid: int, gate: Gate = "radial") -> None:
        super().__init__()
        self.embedding = Embedding(channels, width, grid)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, gate) for _ in range(depth))
        self.norm = InstanceCentreNorm()

    def forward(self, x_BCHW: Tensor, masked_BN: Tensor | None = None, mask_token_D: Tensor | None = None) -> Tensor:
        """Features of shape (B, N, D).

        Args:
            x_BCHW: slices in [0, 1], H and W multiples of 16.
            masked_BN: pretraining only: the patches that are hidden behind `mask_token_D`.
            mask_token_D: the token that stands for a hidden patch.
        """
        patch = self.embedding.patch
        grid = (x_BCHW.shape[-2] // patch, x_BCHW.shape[-1] // patch)
        mask_BN = foreground_tokens(x_BCHW, patch)
        x_BND = self.embedding(x_BCHW)
        if masked_BN is not None and mask_token_D is not None:
            x_BND = torch.where(masked_BN.unsqueeze(-1), mask_token_D, x_BND)
        for block in self.blocks:
            x_BND = block(x_BND, mask_BN, grid)
        return self.norm(x_BND, mask_BN)
