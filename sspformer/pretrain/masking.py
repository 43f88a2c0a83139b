"""Inverse-frequency hierarchical masking and frequency-weighted k-space noise (SSPFormer, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BASE_RATE = 0.25


def edge_energy(x_BCHW: Tensor, patch: int) -> Tensor:
    """E = (|dI/dx| + |dI/dy|) / 2, averaged over each patch; shape (B, N)."""
    image = x_BCHW.amax(dim=1, keepdim=True)
    dx = F.pad((image[..., :, 1:] - image[..., :, :-1]).abs(), (0, 1, 0, 0))
    dy = F.pad((image[..., 1:, :] - image[..., :-1, :]).abs(), (0, 0, 0, 1))
    return F.avg_pool2d((dx + dy) / 2, patch).flatten(1)


def hidden_patches(x_BCHW: Tensor, patch: int, generator: torch.Generator, inverse_frequency: bool = True) -> Tensor:
    """Which patches are hidden, boolean (B, N).

    Each patch is hidden with probability 25%; where `inverse_frequency`, the half of the patches with the higher edge
    energy only with half of that, so that fine detail stays visible.
    """
    energy_BN = edge_energy(x_BCHW, patch)
    rate_BN = torch.full_like(energy_BN, BASE_RATE)
    if inverse_frequency:
        rate_BN[energy_BN > energy_BN.median(dim=1, keepdim=True).values] = BASE_RATE / 2
    return torch.rand(energy_BN.shape, generator=generator).to(energy_BN.device) < rate_BN


def k_space_noise(x_BCHW: Tensor, generator: torch.Generator, strength: float = 0.3) -> Tensor:
    """F' = F + strength * |F| * W(u, v) * N(0, 1) in k-space, with W the radial frequency scaled to [0, 1].

    Returns:
        Slices of the same shape, clipped at zero; absent contrasts stay zero.
    """
    spectrum = torch.fft.fft2(x_BCHW.float())
    height, width = x_BCHW.shape[-2:]
    radius = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width)[None, :] ** 2).sqrt()
    weight = (radius / radius.max()).to(x_BCHW.device)
    noise = torch.randn(spectrum.shape, generator=generator).to(x_BCHW.device)
    return torch.fft.ifft2(spectrum + strength * spectrum.abs() * weight * noise).real.clamp_min(0)
