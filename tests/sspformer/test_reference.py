"""The packaged weights: small, a pair, and made by a command that works."""

from __future__ import annotations

from pathlib import Path

from sspformer.checkpoint import file_digest, load_encoder, load_head, read_gradient_rms
from sspformer.pretrain.loop import Recipe
from sspformer.pretrain.reference import ReferenceRecipe, make_reference
from sspformer.reference import ENCODER, HEAD


def test_the_packaged_pair_is_small_and_fits_together():
    assert ENCODER.stat().st_size + HEAD.stat().st_size <= 8_000_000
    _, arch = load_encoder(ENCODER)
    head, _ = load_head(HEAD, of=arch, encoder_digest=file_digest(ENCODER))
    assert set(read_gradient_rms(HEAD)) == {name for name, _ in head.named_parameters()}


def test_the_command_that_made_them_works(tmp_path: Path):
    """The whole way, with hardly any patients and steps."""
    recipe = ReferenceRecipe(patients=8, slices=2, encoder=Recipe(steps=2, batch_slices=2), head_steps=2, head_batch=2)
    stages: list[str] = []
    encoder, head = make_reference(recipe, tmp_path / "work", tmp_path / "out", lambda *a: stages.append(a[0]))
    _, arch = load_encoder(encoder)
    load_head(head, of=arch, encoder_digest=file_digest(encoder))
    assert len(read_gradient_rms(head)) > 50
    assert {stage.split(" loss")[0] for stage in stages} >= {"patients", "slices", "encoder", "features", "head"}
