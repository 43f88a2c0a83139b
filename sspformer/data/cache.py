"""The frozen-feature cache: the encoder runs once per slice, and never again.

Features can be inverted: an entry is patient data. Files are 0600 in a 0700 folder per subject, and forgetting a
subject removes its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sspformer.contract.errors import Code, Refused
from sspformer.data.bids import Scan
from sspformer.data.slices import cut_slices
from sspformer.data.volume import read_volume
from sspformer.model.assembly import CHANNELS
from sspformer.model.encoder import Encoder
from sspformer.tasks.denoise import Denoise

PREPROCESSING = "slices-3"
"""Changes whenever slices are cut, normalised or degraded differently, so that no older entry is ever used."""

_SUBJECT_FOLDER = re.compile(r"[0-9a-f]{24}")
_CHANNEL_OF = {name: i for i, name in enumerate(CHANNELS)} | {"PDw": 1}


@dataclass(frozen=True)
class Example:
    """Slices of one scan, ready for a head: features (S, N, D), base and target (S, H, W), all float16; inside bool."""

    features: Tensor
    base: Tensor
    target: Tensor
    inside: Tensor


@dataclass(frozen=True)
class Entry:
    """One cached scan in one noise variant, and how many slices it holds."""

    path: Path
    slices: int


class FeatureCache:
    """Entries on disk, one file per scan and noise variant.

    The key is the digest of encoder, preprocessing, degradation and input file, and the file carries its key and the
    digest of its own bytes: a wrong, stale or damaged entry is never used, it is made again.

    Args:
        folder: where entries live.
        encoder: the frozen encoder, on the device it should run on.
        encoder_digest: its digest.
        task: degrades slices.
        size_px: side of a slice.
        max_slices: slices per scan.
    """

    def __init__(
        self, folder: Path, encoder: Encoder, encoder_digest: str, task: Denoise, size_px: int, max_slices: int
    ) -> None:
        self.folder = folder
        self.encoder = encoder
        self.encoder_digest = encoder_digest
        self.task = task
        self.size_px = size_px
        self.max_slices = max_slices
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(folder, error) from error

    def entry(self, scan: Scan, variant: int) -> Entry:
        """The entry of a scan, made if it is not there.

        Raises:
            Refused: E-DATA where the scan cannot be used, E-STATE where the cache cannot be written.
        """
        key = self._key(scan, variant)
        path = self._subject_folder(scan.subject) / f"{key}.safetensors"
        slices = _sound_slices(path, key)
        if slices is None:
            tensors = self._compute(scan, variant)
            try:
                self._write(path, key, tensors)
            except OSError as error:
                raise _not_writable(self.folder, error) from error
            slices = len(tensors["base"])
        return Entry(path, slices)

    def load(self, entry: Entry) -> Example:
        """Read an entry."""
        with safetensors.safe_open(entry.path, framework="pt") as file:
            return Example(*(file.get_tensor(name) for name in ("features", "base", "target", "inside")))

    def keep_only(self, subjects: set[str]) -> int:
        """Remove the entries of every other subject (opted out, or gone from the dataset); returns how many folders."""
        keep = {self._subject_folder(s).name for s in subjects}
        # Only folders named as this cache names them: the cache may have been put beside other things.
        gone = [p for p in self.folder.iterdir() if _SUBJECT_FOLDER.fullmatch(p.name) and p.name not in keep]
        for path in gone:
            shutil.rmtree(path)
        return len(gone)

    def forget(self, subjects: set[str]) -> None:
        """Remove the entries of these subjects."""
        for path in map(self._subject_folder, subjects):
            if path.exists():
                shutil.rmtree(path)

    def _subject_folder(self, subject: str) -> Path:
        return self.folder / hashlib.sha256(b"subject:" + subject.encode()).hexdigest()[:24]

    def _key(self, scan: Scan, variant: int) -> str:
        try:
            file_digest = hashlib.sha256(scan.path.read_bytes()).hexdigest()
        except OSError as error:
            raise Refused(Code.DATA, f"{scan.path} is not usable: it cannot be read ({error.strerror}).",
                          "check the file and its permissions.") from error  # fmt: skip
        facts = [PREPROCESSING, self.encoder_digest, self.size_px, self.max_slices, self.task.name,
                 repr(self.task), scan.contrast, file_digest, variant]  # fmt: skip
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _compute(self, scan: Scan, variant: int) -> dict[str, Tensor]:
        stack = cut_slices(read_volume(scan.path), self.size_px, self.max_slices)
        if not len(stack.images):
            raise Refused(Code.DATA, f"{scan.path} is not usable: no slice shows enough of the head.",
                          "check the field of view.")  # fmt: skip
        # The seed depends on the image and the variant, never on the subject's name.
        seed = int.from_bytes(hashlib.sha256(stack.images.tobytes() + bytes([variant])).digest()[:8], "big")
        base = self.task.degrade(stack.images, seed)
        return {
            "features": encode(self.encoder, base, scan.contrast).half(),
            "base": torch.from_numpy(base).half(),
            "target": torch.from_numpy(stack.images).half(),
            "inside": torch.from_numpy(stack.head),
        }

    def _write(self, path: Path, key: str, tensors: dict[str, Tensor]) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        payload = safetensors.torch.save(tensors, metadata={"key": key, "content": _content_digest(tensors)})
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(payload)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)


def encode(encoder: Encoder, base_SHW: np.ndarray, contrast: str) -> Tensor:
    """Features (S, N, D) of single-contrast slices: each fills its own channel, absent contrasts are zero.

    Raises:
        Refused: E-DATA for a contrast the encoder has no channel for.
    """
    channel = _CHANNEL_OF.get(contrast.removeprefix("ce-"))
    if channel is None:
        raise Refused(Code.DATA, f"contrast {contrast} has no channel.", f"use one of {', '.join(_CHANNEL_OF)}.")
    device = next(encoder.parameters()).device
    features = []
    with torch.inference_mode():
        for one in base_SHW:
            x = torch.zeros(1, len(CHANNELS), *one.shape, device=device)
            x[0, channel] = torch.from_numpy(one).to(device)
            features.append(encoder(x).cpu())
    return torch.cat(features)


def _not_writable(folder: Path, error: OSError) -> Refused:
    return Refused(Code.STATE, f"feature cache {folder} cannot be written ({error.strerror}).",
                   "check the folder, its permissions and the space on its disk.")  # fmt: skip


def _content_digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def _sound_slices(path: Path, key: str) -> int | None:
    """Slices of an entry that is whole and belongs to the key; None where there is no such entry."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, safetensors.SafetensorError):
        return None
    if metadata.get("key") != key or metadata.get("content") != _content_digest(tensors):
        return None
    return len(tensors["base"])
