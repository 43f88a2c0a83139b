"""Checkpoints: loaded exactly, or not at all."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch

from sspformer.checkpoint import file_digest, load_encoder, load_head, save_module, save_tensors
from sspformer.contract.errors import Code, Refused
from sspformer.model.assembly import Head, build_encoder
from tests.phantom import MINI

ENCODER = "sha256:" + 64 * "e"


@pytest.fixture(scope="module")
def head() -> Head:
    torch.manual_seed(0)
    return Head(MINI)


@pytest.fixture
def path(tmp_path, head):
    save_module(tmp_path / "head.safetensors", head, MINI, "head", encoder_digest=ENCODER)
    return tmp_path / "head.safetensors"


def code(path, loader=load_head, **expected) -> Code:
    with pytest.raises(Refused) as caught:
        loader(path, **expected)
    assert str(path) in caught.value.what
    assert "\n" not in str(caught.value)
    return caught.value.code


def tampered(path, change) -> None:
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    metadata = {"role": "head", "architecture": json.dumps(asdict(MINI)), "encoder": ENCODER}
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


def test_round_trip(path, head):
    loaded, arch = load_head(path, file_digest(path), of=MINI)
    assert arch == MINI
    for (name, a), (other, b) in zip(head.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_an_encoder_in_half_precision_comes_back_frozen_and_in_float32(tmp_path):
    encoder = build_encoder(MINI)
    digest = save_module(tmp_path / "encoder.safetensors", encoder, MINI, "encoder", half=True)
    loaded, arch = load_encoder(tmp_path / "encoder.safetensors", digest)
    assert arch == MINI
    for a, b in zip(encoder.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a.detach().half().float(), b)
        assert b.dtype == torch.float32
        assert not b.requires_grad
    assert not loaded.training


def test_equal_heads_have_equal_bytes(tmp_path, head):
    digests = {
        save_module(tmp_path / f"{i}.safetensors", head, MINI, "head", encoder_digest=ENCODER) for i in range(12)
    }
    assert len(digests) == 1
    assert digests == {file_digest(tmp_path / "3.safetensors")}


def test_saving_leaves_one_whole_file(tmp_path, head):
    save_module(tmp_path / "deep" / "er" / "head.safetensors", head, MINI, "head", encoder_digest=ENCODER)
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["head.safetensors"]


def test_what_cannot_be_written_is_one_line(tmp_path, head):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused) as caught:
        save_module(tmp_path / "file" / "head.safetensors", head, MINI, "head", encoder_digest=ENCODER)
    assert caught.value.code is Code.STATE


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("tail.last.bias"),
        lambda t: t.update({"tail.last.extra": torch.zeros(1)}),
        lambda t: t.update({"tail.last.bias": torch.zeros(5)}),
        lambda t: t.update({"tail.last.bias": torch.zeros(4, 1)}),
        lambda t: t.update({"tail.last.bias": torch.tensor([0.0, 1.0, float("nan"), 0.0])}),
        lambda t: t.update({"decoder.task": torch.full((16,), float("inf"))}),
        lambda t: t.update({"TAIL.last.bias": t.pop("tail.last.bias")}),
    ],
    ids=["missing", "extra", "shape", "rank", "nan", "inf", "renamed"],
)
def test_keys_shapes_and_values_must_be_exact(path, change):
    load_head(path)  # what `tampered` starts from is sound
    tampered(path, lambda tensors: None)
    load_head(path)
    tampered(path, change)
    assert code(path) is Code.TENSORS


def test_a_flipped_byte_is_a_wrong_digest(path):
    digest = file_digest(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert code(path, digest=digest) is Code.DIGEST
    load_head(path)  # the mutant: without a digest nobody would have seen it


def test_a_pickle_is_refused_and_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    for name, payload in (
        ("plain.pt", pickle.dumps(Trap())),
        ("empty", b""),
        ("text", b"hello, this is no checkpoint"),
    ):
        (tmp_path / name).write_bytes(payload)
        assert code(tmp_path / name) is Code.FORMAT
    torch.save({"w": torch.zeros(2)}, tmp_path / "torch.pt")
    assert code(tmp_path / "torch.pt") is Code.FORMAT
    assert not (tmp_path / "ran").exists()


def test_roles_are_not_mixed_up(tmp_path, path):
    save_module(tmp_path / "encoder.safetensors", build_encoder(MINI), MINI, "encoder")
    assert code(tmp_path / "encoder.safetensors") is Code.FORMAT
    assert code(path, load_encoder) is Code.FORMAT


def test_a_head_for_another_encoder_is_refused(path):
    assert code(path, of=replace(MINI, name="other")) is Code.TENSORS


def test_a_head_of_another_encoder_of_the_same_architecture_is_refused(path):
    load_head(path, of=MINI, encoder_digest=ENCODER)
    assert code(path, of=MINI, encoder_digest="sha256:" + 64 * "f") is Code.TENSORS
    load_head(path, of=MINI)  # the mutant: by architecture alone nobody would have seen it


def test_a_head_that_states_no_encoder_is_refused(tmp_path, path, head):
    tensors = safetensors.torch.load(path.read_bytes())
    metadata = {"role": "head", "architecture": json.dumps(asdict(MINI))}
    save_tensors(tmp_path / "bare.safetensors", tensors, metadata)
    assert code(tmp_path / "bare.safetensors") is Code.FORMAT
    assert code(tmp_path / "bare.safetensors", encoder_digest=ENCODER) is Code.FORMAT
    save_tensors(tmp_path / "bare.safetensors", tensors, metadata | {"encoder": ENCODER})
    load_head(tmp_path / "bare.safetensors", encoder_digest=ENCODER)  # that it did not say was all that was wrong
    with pytest.raises(ValueError, match="encoder"):
        save_module(tmp_path / "none.safetensors", head, MINI, "head")


def test_missing_file_and_folder(tmp_path):
    assert code(tmp_path / "gone.safetensors") is Code.STATE
    assert code(tmp_path) is Code.STATE


@pytest.mark.parametrize(
    "architecture",
    [None, "", "[]", "{}", "7", "null", json.dumps(asdict(MINI) | {"width": 10**12}),
     json.dumps(asdict(MINI) | {"heads": 0}), json.dumps(asdict(MINI) | {"extra": 1}),
     json.dumps(asdict(MINI) | {"gate": "none"}), json.dumps(asdict(MINI) | {"width": "32"})],
)  # fmt: skip
def test_an_architecture_that_cannot_be(tmp_path, architecture):
    metadata = {"role": "head"} | ({} if architecture is None else {"architecture": architecture})
    save_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(2)}, metadata)
    assert code(tmp_path / "x.safetensors") is Code.FORMAT
