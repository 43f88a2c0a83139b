"""The network against the paper's counts, direct formulas, and the properties that the federation leans on."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sspformer.contract.errors import Refused
from sspformer.describe import describe
from sspformer.model.assembly import (
    CHANNELS,
    PRESETS,
    Architecture,
    Head,
    architecture,
    build_encoder,
    parameter_count,
    trainable_names,
)
from sspformer.model.attention import Attention
from sspformer.model.decoder import Decoder, DecoderBlock
from sspformer.model.encoder import RADIAL_BINS, FrequencyGate, radial_bins
from sspformer.model.norm import InstanceCentreNorm, foreground_tokens, otsu_threshold
from tests.phantom import MINI


def counted(preset: str, tail: str = "injected") -> tuple[torch.nn.Module, torch.nn.Module]:
    arch = architecture(preset, tail)  # type: ignore[arg-type]
    with torch.device("meta"):
        return build_encoder(arch), Head(arch)


def test_paper_preset_has_the_papers_counts():
    encoder, head = counted("paper")
    assert abs(parameter_count(head) - 900_000) <= 20_000
    assert abs(parameter_count(encoder) - 21_600_000) <= 100_000
    gates = sum(p.numel() for name, p in encoder.named_parameters() if ".gate." in name)
    assert 0 < gates / parameter_count(encoder) <= 0.003
    front = parameter_count(encoder.embedding.slim_head) + parameter_count(encoder.embedding.tokeniser)
    assert front == 211_102


def test_other_presets():
    base, head = counted("base")
    assert abs(parameter_count(base) + parameter_count(head) - 97_100_000) <= 200_000
    tiny, _ = counted("tiny")
    assert 2_000_000 <= parameter_count(tiny) <= 3_000_000


def test_describe_says_what_is_counted():
    text = "\n".join(describe("paper"))
    encoder, head = counted("paper")
    assert f"{parameter_count(head):,}" in text
    assert f"{parameter_count(encoder):,}" in text
    assert "211,102" in text
    assert float(re.search(r"([\d.]+)% of the encoder", text)[1]) <= 0.3
    for wrong in (("huge", "injected"), ("paper", "unet")):
        with pytest.raises(Refused, match="unknown"):
            describe(*wrong)


@pytest.mark.parametrize("tail", ["injected", "paper"])
@pytest.mark.parametrize("size", [224, 256])
def test_untrained_head_returns_exactly_the_noisy_slice(tail, size):
    """Both sizes run on positions learnt at 224, and no pixel is touched."""
    arch = architecture("tiny", tail)
    encoder, head = build_encoder(arch), Head(arch)
    x = torch.zeros(1, len(CHANNELS), size, size)
    x[:, 0] = torch.rand(1, size, size)
    with torch.inference_mode():
        features = encoder(x)
        output = head(features, x[:, :1])
    assert features.shape == (1, (size // 16) ** 2, arch.width)
    assert torch.isfinite(features).all()
    assert torch.equal(output, x[:, :1])


def test_a_trained_head_does_use_its_features():
    """The mutant of the test above: with a last layer that is not zero, output depends on base and on features."""
    torch.manual_seed(0)
    head = Head(MINI)
    torch.nn.init.normal_(head.tail.last.weight, std=0.1)
    features, base = torch.randn(1, 16, MINI.width), torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        output = head(features, base)
        assert not torch.equal(output, base)
        assert not torch.equal(head(features + 1 * torch.randn_like(features), base), output)


def test_every_parameter_of_a_trained_head_gets_a_gradient():
    torch.manual_seed(0)
    head = Head(MINI)
    torch.nn.init.normal_(head.tail.last.weight, std=0.1)
    head(torch.randn(2, 16, MINI.width), torch.rand(2, 1, 64, 64)).square().mean().backward()
    idle = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert idle == []


def test_no_key_bias():
    assert Attention(8, 2).key.bias is None


def test_instance_centre_norm_against_the_direct_formula():
    torch.manual_seed(0)
    x, mask = torch.randn(3, 10, 6) * 4 + 2, torch.rand(3, 10) < 0.5
    mask[:, 0] = True
    got = InstanceCentreNorm(eps=1e-5)(x, mask)
    for b in range(3):
        centre = torch.stack([x[b, i] for i in range(10) if mask[b, i]]).mean(dim=0)
        values = x[b].flatten()
        spread = ((values - values.mean()) ** 2).mean().sqrt()
        torch.testing.assert_close(got[b], (x[b] - centre) / (spread + 1e-5))


def test_instance_centre_norm_has_no_parameters_and_survives_a_constant_slice():
    norm = InstanceCentreNorm()
    assert parameter_count(norm) == 0
    assert torch.equal(norm(torch.ones(1, 4, 3), torch.ones(1, 4, dtype=torch.bool)), torch.zeros(1, 4, 3))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=30).filter(lambda v: len(set(v)) > 1))
def test_otsu_maximises_between_class_variance(values):
    row = torch.tensor([values], dtype=torch.float32)
    threshold = otsu_threshold(row).item()

    def between(t):
        low, high = row[row <= t], row[row > t]
        return len(low) * len(high) * (low.mean() - high.mean()).item() ** 2 if len(low) and len(high) else 0.0

    best = max(between(v) for v in values)
    assert between(threshold) == pytest.approx(best, rel=1e-4)


def test_foreground_is_the_tissue_and_not_the_noise_floor():
    torch.manual_seed(0)
    clean = torch.zeros(1, 6, 64, 64)
    clean[:, 2, 16:48, 16:48] = 0.8
    noisy = torch.hypot(clean + 0.1 * torch.randn_like(clean), 0.1 * torch.randn_like(clean)) * (
        clean.amax((2, 3), True) > 0
    )
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:3, 1:3] = True
    assert torch.equal(foreground_tokens(noisy, 16)[0], expected.flatten())


def test_too_few_foreground_patches_count_as_none():
    """One bright patch of sixteen is fewer than two: all patches count. With two, only those two."""
    x = torch.zeros(2, 1, 64, 64)
    x[:, :, :16, :16] = 1.0
    x[1, :, :16, 16:32] = 1.0
    mask = foreground_tokens(x, 16)
    assert mask[0].all()
    assert mask[1].sum() == 2
    assert foreground_tokens(torch.zeros(1, 6, 64, 64), 16).all()  # an empty slice must not divide by zero


def test_decoder_output_is_contiguous():
    """Per-sample gradients of convolutions over channels-last activations are silently wrong in a DP library."""
    decoder = Decoder(MINI.width, 16, 1, 2, 64, MINI.grid)
    tokens = decoder(torch.randn(2, 16, MINI.width), (4, 4))
    assert tokens.is_contiguous()
    assert tokens.shape == (2, 16, 4, 4)
    assert (
        not decoder.norm_out(torch.randn(2, 16, 16)).transpose(1, 2).unflatten(2, (4, 4)).is_contiguous()
    )  # without it


def test_token_order_is_row_major_from_slice_to_map():
    """A patch stays at its place: with identity-like layers the decoder's map holds token n at (n // g, n % g)."""
    arch = Architecture(
        "mini", width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, size_px=64
    )
    encoder = build_encoder(arch)
    a, b = torch.zeros(1, 6, 64, 64), torch.zeros(1, 6, 64, 64)
    b[:, 0, 20, 52] = 1.0  # row 1, column 3
    moved = (encoder.embedding(b) - encoder.embedding(a)).abs().sum(dim=2)[0]
    assert moved.argmax() == 1 * 4 + 3


def test_task_token_moves_the_query_only():
    """Cross-attention sees query + task; keys and values never do."""
    torch.manual_seed(0)
    block, seen = DecoderBlock(16, 2, 32), {}
    block.cross_attention.query.register_forward_pre_hook(lambda m, x: seen.update(query=x[0].clone()))
    block.cross_attention.key.register_forward_pre_hook(lambda m, x: seen.update(key=x[0].clone()))
    block.cross_attention.value.register_forward_pre_hook(lambda m, x: seen.update(value=x[0].clone()))
    x, memory, task = torch.randn(1, 5, 16), torch.randn(1, 5, 16), torch.randn(16)
    block(x, memory, torch.zeros(16))
    without = dict(seen)
    block(x, memory, task)
    torch.testing.assert_close(seen["query"], without["query"] + task)
    assert torch.equal(seen["key"], without["key"])
    assert torch.equal(seen["key"], memory)
    assert torch.equal(seen["value"], memory)


def test_literal_gate_has_no_parameters_and_pins_the_corner():
    gate = FrequencyGate(4, "literal")
    assert parameter_count(gate) == 0
    x = torch.randn(1, 16, 4)
    values = gate(x, (4, 4))[0]
    expected = torch.sigmoid(torch.fft.ifft2(torch.fft.fft2(x[0].T.reshape(4, 4, 4)).abs()).real).reshape(4, 16).T
    torch.testing.assert_close(values, expected)
    assert (values[0] == values.max(dim=0).values).all()  # the paper's gate forgets where things are


def test_radial_gate_against_the_direct_formula():
    torch.manual_seed(0)
    gate = FrequencyGate(3, "radial")
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 36, 3)
    got = gate(x, (6, 6))[0].T.reshape(3, 6, 6)
    spectrum = torch.fft.fft2(x[0].T.reshape(3, 6, 6))
    fy, fx = torch.meshgrid(torch.fft.fftfreq(6), torch.fft.fftfreq(6), indexing="ij")
    bins = ((fy**2 + fx**2).sqrt() / 0.5**0.5 * (RADIAL_BINS - 1)).round().long()
    half = torch.fft.rfft2(x[0].T.reshape(3, 6, 6)).abs().mean(dim=(1, 2), keepdim=True)
    filtered = torch.fft.ifft2(gate.radial[:, bins] * spectrum.abs() / (half + 1e-6) * spectrum).real
    torch.testing.assert_close(got, torch.sigmoid(gate.scale[:, None, None] * filtered + gate.offset[:, None, None]))


def test_radial_bins_mean_the_same_frequency_on_every_grid():
    assert radial_bins((14, 14), torch.device("cpu"))[7, 0] == radial_bins((16, 16), torch.device("cpu"))[8, 0]
    assert radial_bins((16, 16), torch.device("cpu")).max() == RADIAL_BINS - 1


def test_gate_runs_in_float32_under_autocast():
    gate = FrequencyGate(4, "radial")
    x = torch.randn(1, 9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gate(x, (3, 3))
    torch.testing.assert_close(inside, gate(x, (3, 3)))


@pytest.mark.parametrize(("part", "starts"), [("tail", "tail."), ("norms", "tail.")])
def test_trainable_parts(part, starts):
    head = Head(MINI)
    names = trainable_names(head, part)
    assert names
    assert all(name.startswith(starts) for name in names)
    assert set(names) < set(trainable_names(head, "head")) == {name for name, _ in head.named_parameters()}
    assert "tail.last.bias" in names
    assert ("tail.last.weight" in names) == (part == "tail")


@pytest.mark.parametrize(
    "change",
    [{"width": 0}, {"width": 10**9}, {"width": 33}, {"depth": "5"}, {"depth": True}, {"size_px": 100}, {"tail": "unet"},
     {"gate": "none"}, {"decoder_heads": 3}],
)  # fmt: skip
def test_impossible_architectures_are_refused(change):
    from dataclasses import replace

    with pytest.raises(ValueError, match=r".+"):
        replace(PRESETS["tiny"], **change)
