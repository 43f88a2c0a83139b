"""The pretraining loop: resumable to the bit, and never on top of another recipe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from sspformer.checkpoint import load_encoder
from sspformer.contract.errors import Code, Refused
from sspformer.pretrain.loop import MaskedModel, Recipe, collect_slices, pretrain
from tests.phantom import MINI, head_array, write_dataset

RECIPE = Recipe(steps=8, batch_slices=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def slices() -> np.ndarray:
    stack = np.concatenate([head_array(seed, (64, 64, 4)).transpose(2, 0, 1) for seed in range(3)])
    return (np.clip(stack / 900, 0, 1) * 255).astype(np.uint8)


class Stop(Exception):
    """The power goes off."""


def run(folder, slices, recipe=RECIPE, stop_after: int | None = None):
    losses: list[float] = []

    def on_step(step, loss):
        losses.append(loss)
        if step == stop_after:
            raise Stop

    path = pretrain(MINI, slices, recipe, folder, CPU, on_step, save_every=3)
    return safetensors.torch.load(path.read_bytes()), losses


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, slices):
    unbroken, losses = run(tmp_path / "a", slices)
    with pytest.raises(Stop):
        run(tmp_path / "b", slices, stop_after=5)  # saved at 3; steps 4 and 5 are lost
    resumed, rest = run(tmp_path / "b", slices)
    assert rest == losses[3:]
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    other, _ = run(tmp_path / "c", slices, replace(RECIPE, seed=1))
    assert any(not torch.equal(unbroken[name], other[name]) for name in unbroken)


def test_the_encoder_is_written_in_half_precision_and_loads(tmp_path, slices):
    tensors, _ = run(tmp_path, slices, replace(RECIPE, steps=1))
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    _, arch = load_encoder(tmp_path / "encoder.safetensors")
    assert arch == MINI


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 9}, {"k_space_noise": False}, {"learning_rate": 1e-3}])
def test_another_recipe_is_refused(tmp_path, slices, change):
    with pytest.raises(Stop):
        run(tmp_path, slices, replace(RECIPE, steps=4), stop_after=3)
    pretrain(MINI, slices, replace(RECIPE, steps=4), tmp_path, CPU, save_every=3)  # its own recipe goes on
    with pytest.raises(Refused) as caught:
        run(tmp_path, slices, replace(RECIPE, **{"steps": 4} | change))
    assert caught.value.code is Code.STATE


def test_another_architecture_is_refused(tmp_path, slices):
    run(tmp_path, slices, replace(RECIPE, steps=3))
    with pytest.raises(Refused, match="another recipe"):
        pretrain(replace(MINI, depth=1), slices, replace(RECIPE, steps=3), tmp_path, CPU)


def test_a_damaged_resumable_state_is_one_line(tmp_path, slices):
    run(tmp_path, slices, replace(RECIPE, steps=3))
    (tmp_path / "resume.safetensors").write_bytes((tmp_path / "resume.safetensors").read_bytes()[:200])
    with pytest.raises(Refused, match="damaged") as caught:
        run(tmp_path, slices, replace(RECIPE, steps=3))
    assert caught.value.code is Code.STATE


def test_hidden_patches_weigh_twice():
    torch.manual_seed(0)
    model = MaskedModel(MINI)
    torch.nn.init.zeros_(model.read_out.weight)
    torch.nn.init.zeros_(model.read_out.bias)
    target = torch.zeros(1, 1, 64, 64)
    target[..., :16, :16] = 1.0  # only the first patch has an error, of 1
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    x = torch.rand(1, 6, 64, 64)
    assert model(x, hidden, target).item() == pytest.approx(1 / 16)
    hidden[0, 0] = True
    assert model(x, hidden, target).item() == pytest.approx(2 / 17)


def test_a_hidden_patch_is_really_hidden():
    """The first block sees the mask token where a patch is hidden, and the embedding everywhere else."""
    torch.manual_seed(0)
    encoder, token, seen = MaskedModel(MINI).encoder.eval(), torch.randn(MINI.width), []
    encoder.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 5] = True
    x = torch.rand(1, 6, 64, 64)
    with torch.inference_mode():
        encoder(x, hidden, token)
        plain = encoder.embedding(x)
    assert torch.equal(seen[0][0, 5], token)
    assert torch.equal(seen[0][0, ~hidden[0]], plain[0, ~hidden[0]])


def test_collected_slices_are_bytes_and_broken_scans_are_left_out(tmp_path):
    folder = write_dataset(tmp_path / "data", 2)
    counted: list[int] = []
    slices = collect_slices([folder], ("T1w",), 64, 2, counted.append)
    assert slices.shape == (4, 64, 64)
    assert slices.dtype == np.uint8
    assert slices.max() == 255
    assert counted == [2, 4]
    (folder / "sub-00/anat/sub-00_T1w.nii.gz").write_bytes(b"")
    assert len(collect_slices([folder], ("T1w",), 64, 2)) == 2
    (folder / "sub-01/anat/sub-01_T1w.nii.gz").write_bytes(b"")
    with pytest.raises(Refused) as caught:
        collect_slices([folder], ("T1w",), 64, 2)
    assert caught.value.code is Code.DATA
