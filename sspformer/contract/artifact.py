"""The header of a safetensors file, checked without loading a tensor and without torch.

A safetensors file is eight bytes of header length (little endian), a JSON header, then raw tensor data. The checks are
narrower than the format: only F16 and F32, tensors that fill the data without a gap or an overlap, plain names, a small
header. What passes cannot run code and cannot ask for more memory than the file's own size.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sspformer.contract.canonical import parse
from sspformer.contract.errors import Code, Refused

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
_MAX_DIMENSIONS = 8
_DTYPE_BYTES = {"F16": 2, "F32": 4}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,199}")
_PICKLE = re.compile(rb"\x80[\x00-\x05]|PK\x03\x04|\x1f\x8b|\xfd7zXZ|BZh")  # bare pickle; torch.save's zip; compressed


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file: its dtype ("F16" or "F32") and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the raw data."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: Path, name: str | None = None) -> Header:
    """Check a safetensors file's header against the file's size.

    Args:
        path: the file.
        name: what to call it in a refusal; the file's name if not given.

    Raises:
        Refused: E-FORMAT when the file is anything but a plain safetensors file; E-STATE when it cannot be read.
    """
    name = name or path.name
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if _PICKLE.match(start) and file.read(1) != b"{":  # a header of 128 bytes begins like a pickle, too
                raise _refused(name, "is a pickle or an archive, which could run code when loaded")
            file.seek(len(start))
            if len(start) < 8:
                raise _refused(name, f"has only {size} bytes")
            if length > MAX_HEADER_BYTES:
                raise _refused(name, f"announces a header of {length} bytes; {MAX_HEADER_BYTES} are allowed")
            if length > size - 8:
                raise _refused(name, "is shorter than its header says")
            raw = file.read(length)
    except OSError as error:
        raise Refused(
            Code.STATE, f"{path} cannot be read ({error.strerror}).", "Check the path and its rights."
        ) from None
    if not raw.startswith(b"{"):
        raise _refused(name, "has no JSON header")
    fields = parse(raw, f"the header of {name}", max_bytes=MAX_HEADER_BYTES)
    metadata = _metadata(name, fields.pop("__metadata__", {}))
    return Header(_tensors(name, fields, size - 8 - length), metadata, size)


def _metadata(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _refused(name, "has metadata that is not text")
    return value


def _tensors(name: str, fields: dict[str, Any], data_bytes: int) -> dict[str, TensorSpec]:
    if not 0 < len(fields) <= MAX_TENSORS:
        raise _refused(name, f"names {len(fields)} tensors")
    tensors: dict[str, TensorSpec] = {}
    spans: list[tuple[int, int]] = []
    for tensor, entry in fields.items():
        if not _NAME.fullmatch(tensor):
            raise _refused(name, "has a tensor name with unusual characters")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _refused(name, f"describes tensor {tensor} in an unknown way")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
            raise _refused(name, f"holds tensor {tensor} in a dtype other than F16 or F32")
        if not _counts(shape, _MAX_DIMENSIONS) or not _counts(offsets, 2) or len(offsets) != 2:
            raise _refused(name, f"gives tensor {tensor} a shape or offsets that are not counts")
        spec = TensorSpec(dtype, tuple(shape))
        if offsets[1] - offsets[0] != spec.bytes:
            raise _refused(name, f"gives tensor {tensor} a length that does not fit its shape")
        tensors[tensor] = spec
        spans.append((offsets[0], offsets[1]))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _refused(name, "has tensors that overlap or leave a gap")
        end = stop
    if end != data_bytes:
        raise _refused(name, f"has {data_bytes} bytes of data where its header describes {end}")
    return tensors


def _counts(value: Any, most: int) -> bool:
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(number) is int and 0 <= number < 2**40 for number in value)


def _refused(name: str, why: str) -> Refused:
    return Refused(Code.FORMAT, f"{name} {why}.", "Give a plain safetensors file with F16 or F32 tensors.")
