"""The DP step against independent arithmetic: brute force per patient in float64, and Opacus's optimizer."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from site_client.privacy.mechanism import Tally, assign_gradient, private_gradient
from site_client.privacy.sampling import CryptoSource
from sspformer.contract.errors import Code, Refused

KEY = bytes(range(32))
C = 3.5
EXPECTED = 3.5


class ConvNormAttention(nn.Module):
    """The layers that per-sample-gradient libraries get wrong: channels-last into a conv, GroupNorm, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.tail = nn.Conv2d(8, 1, 3, padding=1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW = torch.relu(self.norm(self.stem(x_BCHW)))
        tokens_BNC = y_BCHW.flatten(2).transpose(1, 2)
        mixed_BNC, _ = self.attention(tokens_BNC, tokens_BNC, tokens_BNC, need_weights=False)
        grid_BCHW = (tokens_BNC + mixed_BNC).transpose(1, 2).reshape(y_BCHW.shape)
        return x_BCHW + self.tail(grid_BCHW)


@pytest.fixture
def model() -> ConvNormAttention:
    torch.manual_seed(0)
    return ConvNormAttention()


@pytest.fixture
def slices() -> dict[str, torch.Tensor]:
    """Patients with one to four slices; the scale differs so that some are clipped and some are not."""
    generator = torch.Generator().manual_seed(1)
    return {
        f"sub-{i}": torch.randn(1 + i % 4, 1, 8, 8, generator=generator) * (0.02 if i % 3 == 0 else 1.0)
        for i in range(6)
    }


def loss_of(model: nn.Module, slices: dict[str, torch.Tensor]):
    return lambda patient: (model(slices[patient]) - 0.5 * slices[patient]).square().mean()


def step(model, slices, *, noise_multiplier=1e-12, source=None, patients=None, **options) -> torch.Tensor:
    return private_gradient(
        list(model.parameters()),
        list(slices) if patients is None else patients,
        loss_of(model, slices),
        clipping_norm=options.pop("clipping_norm", C),
        noise_multiplier=noise_multiplier,
        expected_patients=EXPECTED,
        source=source or CryptoSource(KEY),
        **options,
    )


def brute_force_gradients(model, slices) -> dict[str, np.ndarray]:
    """Per patient, by torch.func in float64: no code shared with the mechanism."""
    double = ConvNormAttention().double()
    double.load_state_dict(model.state_dict())
    parameters = dict(double.named_parameters())

    def loss(values, x):
        return (functional_call(double, values, (x,)) - 0.5 * x).square().mean()

    result = {}
    for patient, x in slices.items():
        gradients = grad(loss)(parameters, x.double())
        result[patient] = np.concatenate([gradients[name].detach().numpy().ravel() for name in parameters])
    return result


def clipped_mean(gradients: dict[str, np.ndarray]) -> np.ndarray:
    return sum(g * min(1.0, C / np.linalg.norm(g)) for g in gradients.values()) / EXPECTED


def test_the_step_equals_brute_force_per_patient_autograd(model, slices):
    gradients = brute_force_gradients(model, slices)
    norms = [np.linalg.norm(g) for g in gradients.values()]
    assert min(norms) < C < max(norms)  # both branches of the clip are taken
    tally = Tally()
    ours = step(model, slices, tally=tally).numpy()
    expected = clipped_mean(gradients)
    assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
    assert tally == Tally(drawn=6, clipped=sum(n > C for n in norms), not_finite=0)


def test_the_step_equals_the_optimizer_of_opacus(model, slices):
    from opacus.optimizers import DPOptimizer

    parameters = list(model.parameters())
    gradients = brute_force_gradients(model, slices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = DPOptimizer(
            torch.optim.SGD(parameters, lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=C,
            expected_batch_size=EXPECTED,
        )
    start = 0
    for p in parameters:
        p.grad_sample = torch.stack(
            [torch.from_numpy(g[start : start + p.numel()]).float().view_as(p) for g in gradients.values()]
        )
        start += p.numel()
    oracle.pre_step()
    theirs = torch.cat([p.grad.flatten() for p in parameters])
    # Opacus clips to C * norm / (norm + 1e-6): equal to 1e-6 of C for these norms.
    assert torch.linalg.vector_norm(step(model, slices) - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs)


def test_the_noise_scale_is_sigma_c_over_the_expected_batch():
    wide = nn.Parameter(torch.zeros(1_000_000))
    for sigma, clipping_norm, expected in ((1.31, 0.5, 9.6), (6.72, 1e-3, 2.0)):
        noise = private_gradient(
            [wide],
            [],
            lambda patient: wide.sum(),
            clipping_norm=clipping_norm,
            noise_multiplier=sigma,
            expected_patients=expected,
            source=CryptoSource(KEY),
        )
        scale = sigma * clipping_norm / expected
        assert float(noise.std()) == pytest.approx(scale, rel=0.01)
        assert abs(float(noise.mean())) < 5 * scale / 1000


def test_noise_is_added_to_the_clipped_sum(model, slices):
    noisy = step(model, slices, noise_multiplier=2.0)
    noise = CryptoSource(KEY).normal(noisy.numel()) * 2.0 * C / EXPECTED
    expected = clipped_mean(brute_force_gradients(model, slices)) + noise
    np.testing.assert_allclose(noisy.numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_an_empty_draw_is_noise_alone(model, slices):
    empty = step(model, slices, patients=[], noise_multiplier=2.0)
    noise = CryptoSource(KEY).normal(empty.numel()) * 2.0 * C / EXPECTED
    np.testing.assert_allclose(empty.numpy(), noise, rtol=1e-6)
    assert float(empty.std()) > 0


def test_a_patient_counts_once_however_many_slices_it_has(model, slices):
    many = {"sub-0": torch.cat([slices["sub-1"]] * 50)}
    assert float(torch.linalg.vector_norm(step(model, many)) * EXPECTED) <= C


def test_a_patient_drawn_twice_is_refused(model, slices):
    with pytest.raises(Refused) as refusal:
        step(model, slices, patients=["sub-1", "sub-1"])
    assert refusal.value.code is Code.DATA


def test_the_clipped_norm_never_exceeds_c_in_float32():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-30, 1e-3, 1.0, 1e5, 1e15, 3e37):
        gradient = torch.randn(20_000, generator=generator) * scale
        weight = nn.Parameter(torch.zeros(20_000))
        for clipping_norm in (1e-3, 0.05, 1.0, 77.7):
            clipped = private_gradient(
                [weight],
                ["sub-1"],
                lambda patient, weight=weight, gradient=gradient: (weight * gradient).sum(),
                clipping_norm=clipping_norm,
                noise_multiplier=1e-14,
                expected_patients=1.0,
                source=CryptoSource(KEY),
            )
            norm = float(torch.linalg.vector_norm(clipped, dtype=torch.float64))
            assert norm <= clipping_norm
            if scale >= 1e5:
                assert norm == pytest.approx(clipping_norm, rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_patient_without_a_finite_gradient_contributes_nothing(model, slices, poison):
    bad = dict(slices)
    bad["sub-2"] = torch.full((1, 1, 8, 8), poison)
    tally = Tally()
    with_bad = step(model, bad, tally=tally)
    without = step(model, {name: x for name, x in slices.items() if name != "sub-2"})
    assert torch.equal(with_bad, without)
    assert tally.not_finite == 1
    assert tally.drawn == 6


def test_a_loss_without_parameters_contributes_nothing(model, slices):
    """A patient with no usable slice has a constant loss."""
    gradient = private_gradient(
        list(model.parameters()),
        ["sub-1"],
        lambda patient: torch.tensor(0.0),
        clipping_norm=C,
        noise_multiplier=1.0,
        expected_patients=EXPECTED,
        source=CryptoSource(KEY),
    )
    assert torch.equal(gradient, step(model, slices, patients=[], noise_multiplier=1.0))


@pytest.mark.parametrize("name", ["clipping_norm", "noise_multiplier", "expected_patients"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_constants_without_a_guarantee_are_no_arguments(name, value):
    constants = {"clipping_norm": 1.0, "noise_multiplier": 1.0, "expected_patients": 1.0, name: value}
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=name):
        private_gradient([weight], [], lambda p: weight.sum(), source=CryptoSource(KEY), **constants)


def test_gradients_reach_the_optimizer(model, slices):
    parameters = list(model.parameters())
    flat = step(model, slices)
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    assert all(p.grad is None for p in parameters)  # the step itself leaves no private gradient behind
    optimizer = torch.optim.SGD(parameters, lr=2.0)
    assign_gradient(parameters, flat)
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(after, before - 2.0 * flat)
    with pytest.raises(ValueError, match="length"):
        assign_gradient(parameters, flat[:-1])


def test_half_precision_parameters_are_summed_in_full(slices):
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    gradient = private_gradient(
        [weight],
        [f"sub-{i}" for i in range(1000)],
        lambda patient: weight.sum() * 0.001,
        clipping_norm=1.0,
        noise_multiplier=1e-12,
        expected_patients=1000.0,
        source=CryptoSource(KEY),
    )
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.full((4,), 0.001), rtol=5e-3, atol=0)
    assign_gradient([weight], gradient)
    assert weight.grad.dtype == torch.bfloat16


def test_public_coordinates_scale_before_the_clip():
    """With scales, each patient's scaled gradient is what is clipped, and C bounds it there."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    parameters = list(layer.parameters())
    data = {name: torch.randn(4, 3) for name in "abc"}
    scale_P = torch.tensor([10.0] * 6 + [0.1] * 2)

    def loss(name: str) -> torch.Tensor:
        return layer(data[name]).square().mean()

    got = private_gradient(
        parameters,
        list(data),
        loss,
        clipping_norm=0.5,
        noise_multiplier=1e-9,
        expected_patients=2.0,
        source=CryptoSource(bytes(32)),
        scale_P=scale_P,
    )
    wanted = torch.zeros(8, dtype=torch.float64)
    for name in data:
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss(name), parameters)]).double() * scale_P
        wanted += flat * min(1.0, 0.5 / float(flat.norm()))
    assert torch.allclose(got.double(), wanted / 2.0, rtol=1e-5, atol=1e-8)
    assert float(got.norm()) * 2.0 <= 3 * 0.5
