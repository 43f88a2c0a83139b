"""Presets, and the two halves they assemble: the frozen encoder and the trainable head."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from torch import Tensor, nn

from sspformer.contract.errors import Code, Refused
from sspformer.model.decoder import Decoder
from sspformer.model.encoder import Encoder, Gate
from sspformer.model.tails import InjectedTail, PaperTail

CHANNELS = ("T1w", "T2w", "FLAIR", "dwi", "swi", "T2starw")
"""The six contrasts of the paper, as BIDS suffixes, in channel order."""

TailKind = Literal["injected", "paper"]


@dataclass(frozen=True)
class Architecture:
    """Every number that decides the shapes of the network.

    `width`, `depth`, `heads`: the encoder. `decoder_*`: the decoder. Sizes are in tokens and channels; `size_px` is the
    side of a slice.
    """

    name: str
    width: int
    depth: int
    heads: int
    decoder_width: int = 96
    decoder_depth: int = 4
    decoder_heads: int = 8
    tail: TailKind = "injected"
    gate: Gate = "radial"
    size_px: int = 224

    def __post_init__(self) -> None:
        """Refuse numbers that no network can have: an architecture may come out of a file.

        Raises:
            ValueError: naming the field.
        """
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "tail", "gate")}
        for name, value in numbers.items():
            if type(value) is not int or not 1 <= value <= 4096:
                raise ValueError(f"{name} is {value!r}")
        if self.width % self.heads or self.decoder_width % self.decoder_heads or self.size_px % 16:
            raise ValueError("heads must divide widths, and 16 the size")
        if self.tail not in get_args(TailKind) or self.gate not in get_args(Gate):
            raise ValueError(f"tail is {self.tail!r}, gate is {self.gate!r}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.size_px // 16


PRESETS = {
    "tiny": Architecture("tiny", width=192, depth=5, heads=4, decoder_width=64, decoder_depth=2),
    "paper": Architecture("paper", width=384, depth=12, heads=8),
    "base": Architecture("base", width=576, depth=24, heads=12),
}


def architecture(name: str, tail: TailKind = "injected", gate: Gate = "radial") -> Architecture:
    """The preset of that name.

    Raises:
        Refused: E-CONFIG for an unknown preset.
    """
    if name not in PRESETS:
        raise Refused(Code.CONFIG, f"unknown preset {name!r}.", f"choose one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], tail=tail, gate=gate)


def build_encoder(arch: Architecture) -> Encoder:
    """A freshly initialised encoder."""
    return Encoder(len(CHANNELS), arch.width, arch.depth, arch.heads, arch.grid, arch.gate)


class Head(nn.Module):
    """Decoder and tail: all that a hospital trains and all that it sends back, as an update."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.decoder = Decoder(
            arch.width,
            arch.decoder_width,
            arch.decoder_depth,
            arch.decoder_heads,
            4 * arch.decoder_width,
            arch.grid,
        )
        self.tail = InjectedTail(arch.decoder_width) if arch.tail == "injected" else PaperTail(arch.decoder_width)

    def forward(self, features_BND: Tensor, base_B1HW: Tensor) -> Tensor:
        """The restored slice (B, 1, H, W) from cached features and the degraded slice."""
        grid = (base_B1HW.shape[-2] // 16, base_B1HW.shape[-1] // 16)
        return self.tail(self.decoder(features_BND, grid), base_B1HW)


def trainable_names(head: nn.Module, part: str) -> list[str]:
    """Names of the parameters that a plan trains, in the head's own order.

    Args:
        head: the head.
        part: ``head`` (all of it), ``tail``, or ``norms`` (the tail's normalisation scales and shifts and its biases:
            about a thousand numbers, so that differential privacy has little to drown in noise).
    """
    shapes = {name: parameter.shape for name, parameter in head.named_parameters()}
    names = list(shapes)
    if part == "head":
        return names
    tail = [name for name in names if name.startswith("tail.")]
    if part == "tail":
        return tail
    return [name for name in tail if len(shapes[name]) == 1]


def parameter_count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
