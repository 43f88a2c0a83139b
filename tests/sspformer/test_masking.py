"""What pretraining hides, and the noise that it puts into k-space."""

from __future__ import annotations

import pytest
import torch

from sspformer.pretrain.masking import BASE_RATE, edge_energy, hidden_patches, k_space_noise


def textured(batch: int = 64) -> torch.Tensor:
    """The left half of each slice is flat, the right half is a checkerboard."""
    x = torch.full((batch, 6, 64, 64), 0.0)
    x[:, 0] = 0.5
    x[:, 0, ::2, 32::2] = 1.0
    return x


def test_edge_energy_by_hand():
    """A step of 1 between columns 3 and 4: one pixel column has |dx| = 1, so a mean of 8/64 halved, left patch only."""
    x = torch.zeros(1, 1, 8, 16)
    x[..., 4:] = 1.0
    assert edge_energy(x, 8)[0].tolist() == pytest.approx([8 / 64 / 2, 0.0])
    assert edge_energy(x.transpose(2, 3), 8)[0].tolist() == pytest.approx([8 / 64 / 2, 0.0])


def test_high_energy_patches_are_hidden_at_half_the_rate():
    hidden = hidden_patches(textured(2000), 16, torch.Generator().manual_seed(0)).reshape(-1, 4, 4).float()
    assert hidden[:, :, 0].mean().item() == pytest.approx(BASE_RATE, abs=0.02)
    assert hidden[:, :, 3].mean().item() == pytest.approx(BASE_RATE / 2, abs=0.02)


def test_the_switch_hides_all_alike():
    generator = torch.Generator().manual_seed(0)
    hidden = hidden_patches(textured(2000), 16, generator, inverse_frequency=False).reshape(-1, 4, 4).float()
    for column in range(4):
        assert hidden[:, :, column].mean().item() == pytest.approx(BASE_RATE, abs=0.02)


def test_hiding_follows_its_generator():
    a, b, c = (hidden_patches(textured(), 16, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_k_space_noise_leaves_the_mean_and_absent_channels_alone():
    torch.manual_seed(0)
    x = torch.zeros(2, 6, 64, 64)
    x[:, 1] = 0.6 + 0.1 * torch.rand(2, 64, 64)
    noisy = k_space_noise(x, torch.Generator().manual_seed(0), strength=0.2)
    assert noisy[:, 1].min() > 0  # nothing was clipped, so zero frequency can be compared
    torch.testing.assert_close(noisy.mean(dim=(2, 3)), x.mean(dim=(2, 3)))
    for channel in (0, 2, 3, 4, 5):
        assert torch.equal(noisy[:, channel], torch.zeros(2, 64, 64))
    assert not torch.equal(noisy, x)


def test_k_space_noise_grows_with_the_radius():
    torch.manual_seed(0)
    x = 0.5 + 0.05 * torch.randn(16, 1, 64, 64)
    before, after = torch.fft.fft2(x), torch.fft.fft2(k_space_noise(x, torch.Generator().manual_seed(0)))
    relative = ((after - before).abs() / before.abs()).mean(dim=(0, 1))
    fy, fx = torch.meshgrid(torch.fft.fftfreq(64), torch.fft.fftfreq(64), indexing="ij")
    radius = (fy**2 + fx**2).sqrt()
    inner, outer = relative[(radius > 0) & (radius < 0.1)].mean(), relative[radius > 0.5].mean()
    assert outer > 4 * inner
    assert relative[0, 0] < 1e-4
