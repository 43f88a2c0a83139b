r"""How a head difference travels: fp16, byte planes, zstd, one blob.

One blob and not one record per tensor, because Flower moves every record in several HTTP calls. The layout is

    b"SSPT1\n" | length of header, 4 bytes little endian | header, JSON | one zstd frame

where the header lists names and shapes in sorted order, and the frame holds all values as little-endian fp16, first
every low byte, then every high byte (high bytes of small differences are nearly constant and compress well).
The receiver knows the names and shapes already: it compares, it never allocates what a header asks for.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping

import numpy as np
import zstandard

from sspformer.contract.errors import Code, Refused

DTYPE = "float16"
STYPE = "fp16.shuffle.zstd"
_MAGIC = b"SSPT1\n"
_LEVEL = 3
_NEXT = "Check that both sides use the published head of this run."

Delta = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


def encode(delta: Mapping[str, np.ndarray]) -> bytes:
    """Pack a head difference.

    Args:
        delta: fp32 tensors by name; every value must be finite in fp16.

    Raises:
        Refused: E-TENSORS, a value is not finite once it is fp16.
    """
    names = sorted(delta)
    parts = [np.asarray(delta[name], dtype=np.float32).ravel() for name in names]
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise _refused("a value is not finite in fp16")
    planes = halves.view(np.uint8).reshape(-1, 2).T.tobytes()
    header = _header({name: np.shape(delta[name]) for name in names})
    frame = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(planes)
    return _MAGIC + struct.pack("<I", len(header)) + header + frame


def decode(data: bytes, expected: Shapes) -> Delta:
    """Unpack a head difference that must have exactly the expected names and shapes.

    Memory is bounded by what is expected, whatever the bytes claim.

    Returns:
        fp32 tensors by name, in sorted order; every value is exactly representable in fp16.

    Raises:
        Refused: E-TENSORS, names, shapes, length or values are not the agreed ones.
    """
    header = _header(expected)
    start = len(_MAGIC) + 4
    if data[:start] != _MAGIC + struct.pack("<I", len(header)) or data[start : start + len(header)] != header:
        raise _refused("names or shapes are not the agreed ones")
    frame = data[start + len(header) :]
    sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in expected.items()}
    count = sum(sizes.values())
    try:
        if zstandard.frame_content_size(frame) != 2 * count:
            raise _refused("the compressed values have the wrong length")
        planes = zstandard.ZstdDecompressor().decompress(frame, max_output_size=2 * count, allow_extra_data=False)
    except zstandard.ZstdError:
        raise _refused("the compressed values are damaged") from None
    if len(planes) != 2 * count:
        raise _refused("the compressed values have the wrong length")
    halves = np.frombuffer(planes, np.uint8).reshape(2, count).T.copy().view("<f2").ravel()
    if not np.isfinite(halves).all():
        raise _refused("a value is not finite")
    values = halves.astype(np.float32)
    delta: Delta = {}
    offset = 0
    for name in sorted(expected):
        delta[name] = values[offset : offset + sizes[name]].reshape(expected[name])
        offset += sizes[name]
    return delta


def rounded(delta: Mapping[str, np.ndarray]) -> Delta:
    """The difference as the other side will see it: what `decode` returns for what `encode` sends."""
    return decode(encode(delta), {name: np.shape(value) for name, value in delta.items()})


def zeros(shapes: Shapes) -> Delta:
    """The difference of the published head to itself."""
    return {name: np.zeros(shapes[name], np.float32) for name in sorted(shapes)}


def digest_tensors(delta: Mapping[str, np.ndarray]) -> str:
    """`sha256:` digest of names, shapes and fp32 values; independent of compression and of the order of the mapping."""
    hasher = hashlib.sha256(_header({name: np.shape(value) for name, value in delta.items()}))
    for name in sorted(delta):
        hasher.update(np.ascontiguousarray(delta[name], dtype="<f4").tobytes())
    return f"sha256:{hasher.hexdigest()}"


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    listed = [[name, [int(side) for side in shapes[name]]] for name in sorted(shapes)]
    return json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()


def _refused(reason: str) -> Refused:
    return Refused(Code.TENSORS, f"A head update is refused: {reason}.", _NEXT)
