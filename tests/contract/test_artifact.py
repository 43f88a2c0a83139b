"""The safetensors header: what numpy's writer makes passes, anything else is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from sspformer.contract.artifact import MAX_HEADER_BYTES, TensorSpec, read_header
from sspformer.contract.errors import Code, Refused

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
DTYPES = st.sampled_from([np.float16, np.float32])
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,20}", fullmatch=True).filter(lambda n: n != "__metadata__")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact") / "model.safetensors"


@given(st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=1, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_library_writes_passes(path, tensors):
    path.write_bytes(save({n: np.zeros(shape, dtype) for n, (shape, dtype) in tensors.items()}, {"role": "head"}))
    header = read_header(path)
    names = {np.float16: "F16", np.float32: "F32"}
    assert header.tensors == {n: TensorSpec(names[dtype], shape) for n, (shape, dtype) in tensors.items()}
    assert header.metadata == {"role": "head"}
    assert header.file_bytes == path.stat().st_size


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(
    start: int = 0, stop: int = 8, dtype: str = "F32", shape: object = (2,), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


FINE = file_of({"a": tensor(), "b": tensor(8, 16)}, bytes(16))
BAD = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "no tensors": file_of({}),
    "a pickle": b"\x80\x04\x95" + bytes(50),
    "a zip": b"PK\x03\x04" + bytes(50),
    "header longer than the file": file_of({"a": tensor()}, length=5000),
    "header over the cap": file_of(b"{" + b" " * MAX_HEADER_BYTES + b"}"),
    "header is a list": file_of([1]),
    "header starts with a space": file_of(b" {}"),
    "not JSON": file_of(b"{nope}"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "a name twice": file_of(b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2), bytes(8)),
    "integers": file_of({"a": tensor(dtype="I64", shape=[1])}, bytes(8)),
    "bfloat16": file_of({"a": tensor(dtype="BF16", shape=[4])}, bytes(8)),
    "dtype is a list": file_of({"a": tensor(dtype=["F32"])}, bytes(8)),
    "a gap": file_of({"a": tensor(), "b": tensor(12, 20)}, bytes(20)),
    "an overlap": file_of({"a": tensor(), "b": tensor(4, 12)}, bytes(12)),
    "starts late": file_of({"a": tensor(4, 12)}, bytes(12)),
    "data beyond": file_of({"a": tensor()}, bytes(9)),
    "data missing": file_of({"a": tensor()}, bytes(7)),
    "length does not fit shape": file_of({"a": tensor(shape=[3])}, bytes(8)),
    "negative shape": file_of({"a": tensor(shape=[-2])}, bytes(8)),
    "true in shape": file_of({"a": tensor(shape=[True, 2])}, bytes(8)),
    "float in shape": file_of({"a": tensor(shape=[2.0])}, bytes(8)),
    "huge shape": file_of({"a": tensor(shape=[2**63])}, bytes(8)),
    "nine dimensions": file_of({"a": tensor(shape=[1] * 8 + [2])}, bytes(8)),
    "three offsets": file_of({"a": tensor() | {"data_offsets": [0, 8, 8]}}, bytes(8)),
    "reversed offsets": file_of({"a": tensor(8, 0)}, bytes(8)),
    "an unknown field": file_of({"a": tensor(code="x")}, bytes(8)),
    "a missing field": file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "entry is text": file_of({"a": "tensor"}),
    "a path as a name": file_of({"../a": tensor()}, bytes(8)),
    "an empty name": file_of({"": tensor()}, bytes(8)),
    "metadata is a list": file_of({"__metadata__": [], "a": tensor()}, bytes(8)),
    "metadata holds a number": file_of({"__metadata__": {"x": 1}, "a": tensor()}, bytes(8)),
}


def test_the_plain_file_of_these_tests_passes(path):
    path.write_bytes(FINE)
    assert list(read_header(path).tensors) == ["a", "b"]


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_what_is_not_plain_safetensors_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(Refused) as refusal:
        read_header(path, "the encoder")
    assert refusal.value.code == Code.FORMAT
    assert "the encoder" in refusal.value.what


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_header_is_refused_or_describes_the_same_bytes(path, data):
    changed = bytearray(FINE)
    changed[data.draw(st.integers(0, len(FINE) - 17))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        header = read_header(path)
    except Refused:
        return
    assert sum(spec.bytes for spec in header.tensors.values()) == 16


@pytest.mark.parametrize("length", [0x80, 0x180, 0x580, 0x8B1F])
def test_a_header_whose_length_looks_like_a_pickle_passes(path, length):
    """The first bytes of a safetensors file are a length; some lengths spell another format's mark."""
    raw = json.dumps({"a": tensor()}).encode().ljust(length)
    path.write_bytes(file_of(raw, bytes(8)))
    assert list(read_header(path).tensors) == ["a"]


def test_a_missing_file_is_a_refusal(tmp_path):
    with pytest.raises(Refused) as refusal:
        read_header(tmp_path / "none")
    assert refusal.value.code == Code.STATE
