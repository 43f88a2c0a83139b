"""Checkpoints: safetensors that carry their architecture, loaded against a digest and an exact set of keys."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sspformer.contract.durable import PLAIN_MODE, SECRET_MODE, write_file
from sspformer.contract.errors import Code, Refused
from sspformer.model.assembly import Architecture, Head, build_encoder
from sspformer.model.encoder import Encoder

ENCODER_KEY = "encoder"
"""Metadata of a head: the digest of the encoder file that it was made for. `central publish` reads it too."""


def file_digest(path: Path) -> str:
    """``sha256:<hex>`` of a file.

    Raises:
        Refused: E-STATE where it cannot be read.
    """
    try:
        return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise Refused(Code.STATE, f"{path} cannot be read ({error.strerror}).", "check the path.") from error


def save_module(
    path: Path,
    module: nn.Module,
    arch: Architecture,
    role: str,
    half: bool = False,
    gradient_rms: dict[str, float] | None = None,
    encoder_digest: str | None = None,
    secret: bool = False,
) -> str:
    """Write a module with its architecture, atomically; returns its digest.

    Args:
        path: target file.
        module: encoder or head.
        arch: its architecture.
        role: ``encoder`` or ``head``.
        half: store float16 (for a frozen encoder; features are float16 anyway).
        gradient_rms: see `sspformer.finetune.gradient_rms`; kept in the file's metadata.
        encoder_digest: ``sha256:<hex>`` of the encoder file that a head was made for; every head states it.
        secret: only the owner may read the file: it was trained on patients.
    """
    if (role == "head") != (encoder_digest is not None):
        raise ValueError("a head, and nothing but a head, states the encoder that it was made for")
    tensors = {n: (p.detach().half() if half else p.detach()).cpu().contiguous() for n, p in module.named_parameters()}
    metadata = {"role": role, "architecture": json.dumps(asdict(arch), sort_keys=True)}
    if gradient_rms is not None:
        metadata["gradient_rms"] = json.dumps({name: float(f"{rms:.4g}") for name, rms in gradient_rms.items()})
    if encoder_digest is not None:
        metadata[ENCODER_KEY] = encoder_digest
    return save_tensors(path, tensors, metadata, secret)


def check_new(path: Path) -> None:
    """Refuse a target that exists, before hours of work end in it.

    Raises:
        Refused: E-STATE.
    """
    if path.exists() or path.is_symlink():
        raise Refused(Code.STATE, f"{path} exists already.", "choose another name, or remove it.")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], secret: bool = False) -> str:
    """Write tensors atomically; returns the file's digest. Equal tensors and metadata give equal bytes.

    A secret file is for its owner alone (0600).

    Raises:
        Refused: E-STATE where the file cannot be written.
    """
    payload = _in_order(safetensors.torch.save(tensors, metadata=metadata))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, payload, SECRET_MODE if secret else PLAIN_MODE)
    except OSError as error:
        raise Refused(Code.STATE, f"{path} cannot be written ({error.strerror}).", "check folder and space.") from error
    return "sha256:" + hashlib.sha256(payload).hexdigest()


def _in_order(payload: bytes) -> bytes:
    # The library writes the metadata in an order that changes from call to call, and the digest with it.
    end = 8 + int.from_bytes(payload[:8], "little")
    header = json.dumps(json.loads(payload[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + payload[end:]


def load_encoder(path: Path, digest: str | None = None) -> tuple[Encoder, Architecture]:
    """The frozen encoder of a file, in float32, without gradients.

    Args:
        path: a safetensors file written by `save_module`.
        digest: what the file's digest must be, if known.

    Raises:
        Refused: E-DIGEST, E-FORMAT or E-TENSORS; nothing of the file is used then.
    """
    tensors, arch, _ = _load(path, digest, "encoder")
    encoder = build_encoder(arch)
    assign_exactly(encoder, tensors, str(path))
    return encoder.eval().requires_grad_(False), arch


def load_head(
    path: Path, digest: str | None = None, of: Architecture | None = None, encoder_digest: str | None = None
) -> tuple[Head, Architecture]:
    """The head of a file.

    Two encoders of one architecture give different features: a head works with the very encoder that it was made for.

    Args:
        path: a safetensors file written by `save_module`.
        digest: what the file's digest must be, if known.
        of: the encoder's architecture, if known.
        encoder_digest: digest of the encoder file that the head is to work with, if known.

    Raises:
        Refused: as `load_encoder`; E-FORMAT where the file does not state its encoder; E-TENSORS where it is not a head
            `of` that architecture, or states another encoder than `encoder_digest`.
    """
    tensors, arch, metadata = _load(path, digest, "head")
    stated = metadata.get(ENCODER_KEY)
    if stated is None:
        raise Refused(Code.FORMAT, f"{path} does not state the encoder that it was made for.",
                      "use a head written by this version.")  # fmt: skip
    if of is not None and arch != of:
        raise Refused(Code.TENSORS, f"{path} was made for another encoder ({arch.name}).", "use a matching head.")
    if encoder_digest is not None and stated != encoder_digest:
        raise Refused(Code.TENSORS, f"{path} was made for another encoder ({stated[:19]}…), not for "
                      f"{encoder_digest[:19]}….", "use a matching head.")  # fmt: skip
    head = Head(arch)
    assign_exactly(head, tensors, str(path))
    return head, arch


def read_gradient_rms(path: Path) -> dict[str, float]:
    """What a head's file says about the size of its gradients on public data, by tensor; empty where it says nothing.

    Raises:
        Refused: E-FORMAT where it is not a table of positive numbers.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("gradient_rms", "{}")
    try:
        table = {str(name): float(value) for name, value in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        table = {"": float("nan")}
    if not all(0 < value < float("inf") for value in table.values()):
        raise Refused(Code.FORMAT, f"{path}: gradient_rms is not a table of positive numbers.", "publish it again.")
    return table


def assign_exactly(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into a module's parameters; names, shapes and finiteness must all be right.

    Raises:
        Refused: E-TENSORS naming the first difference.
    """
    expected = dict(module.named_parameters())
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise Refused(Code.TENSORS, f"{where}: {len(missing)} tensors missing {missing[:2]}, {len(extra)} not expected "
                      f"{extra[:2]}.", "use a file made for this preset.")  # fmt: skip
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            raise Refused(Code.TENSORS, f"{where}: {name} has shape {tuple(tensors[name].shape)}, expected "
                          f"{tuple(parameter.shape)}.", "use a file made for this preset.")  # fmt: skip
        if not torch.isfinite(tensors[name]).all():
            raise Refused(Code.TENSORS, f"{where}: {name} is not finite.", "get the file again.")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


def _load(path: Path, digest: str | None, role: str) -> tuple[dict[str, Tensor], Architecture, dict[str, str]]:
    actual = file_digest(path)
    if digest is not None and actual != digest:
        raise Refused(Code.DIGEST, f"{path} has digest {actual[:19]}…, expected {digest[:19]}….", "fetch it again.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        arch = Architecture(**json.loads(metadata["architecture"]))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Refused(Code.FORMAT, f"{path} is not a checkpoint of this product ({type(error).__name__}).",
                      "use a safetensors file written by `sspformer`.") from error  # fmt: skip
    if metadata.get("role") != role:
        raise Refused(Code.FORMAT, f"{path} holds a {metadata.get('role')!r}, not a {role!r}.", "swap the files.")
    return tensors, arch, metadata
