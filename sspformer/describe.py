"""What a preset is made of, in numbers."""

from __future__ import annotations

import torch

from sspformer.contract.errors import Code, Refused
from sspformer.model.assembly import Head, architecture, build_encoder, parameter_count


def describe(preset: str, tail: str = "injected") -> list[str]:
    """Lines with the parameter counts of a preset.

    Raises:
        Refused: E-CONFIG for an unknown preset or tail.
    """
    if tail not in ("injected", "paper"):
        raise Refused(Code.CONFIG, f"unknown tail {tail!r}.", "choose injected or paper.")
    arch = architecture(preset, tail)  # type: ignore[arg-type]
    with torch.device("meta"):  # counts need shapes, not numbers
        encoder, head = build_encoder(arch), Head(arch)
    total = parameter_count(encoder)
    gates = sum(p.numel() for name, p in encoder.named_parameters() if ".gate." in name)
    positions = encoder.embedding.position.numel()
    rows = [
        ("encoder, frozen", total, f"D {arch.width}, L {arch.depth}, {arch.heads} heads"),
        ("  slim head and tokeniser", parameter_count(encoder.embedding) - positions, ""),
        ("  FG-FFN gates", gates, f"{100 * gates / total:.3f}% of the encoder"),
        ("head, trainable", parameter_count(head), f"{arch.tail} tail"),
        ("  decoder", parameter_count(head.decoder), f"d {arch.decoder_width}, l {arch.decoder_depth}"),
        ("  tail", parameter_count(head.tail), ""),
        ("together", total + parameter_count(head), ""),
    ]
    return [f"preset {preset}"] + [f"{name:<28}{count:>12,}  {note}".rstrip() for name, count, note in rows]
