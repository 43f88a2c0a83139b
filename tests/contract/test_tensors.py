"""The codec of head differences: exact, bounded, and closed to everything that was not agreed."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sspformer.contract.errors import Code, Refused
from sspformer.contract.tensors import decode, digest_tensors, encode, rounded, zeros

SHAPES = {"decoder.weight": (7, 5), "tail.scale": (), "tail.bias": (5,)}


def sample(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 1e-2, shape).astype(np.float32) for name, shape in SHAPES.items()}


def refused(data: bytes, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
    with pytest.raises(Refused) as refusal:
        decode(data, shapes)
    assert refusal.value.code is Code.TENSORS


def test_what_is_decoded_is_the_fp16_rounding() -> None:
    delta = sample()
    decoded = decode(encode(delta), SHAPES)
    assert list(decoded) == sorted(SHAPES)
    for name, value in delta.items():
        assert decoded[name].dtype == np.float32
        assert decoded[name].shape == SHAPES[name]
        np.testing.assert_array_equal(decoded[name], value.astype(np.float16).astype(np.float32))


@settings(max_examples=50, deadline=None)
@given(arrays(np.float16, (3, 4), elements=st.floats(-6e4, 6e4, width=16)))
def test_fp16_values_travel_exactly_and_a_second_trip_changes_nothing(values: np.ndarray) -> None:
    delta = {"x": values.astype(np.float32)}
    once = rounded(delta)
    assert once["x"].tobytes() == delta["x"].tobytes()
    assert encode(once) == encode(delta)


def test_the_same_difference_in_another_order_gives_the_same_bytes() -> None:
    delta = sample()
    other = {name: delta[name] for name in reversed(delta)}
    assert encode(delta) == encode(other)
    assert digest_tensors(delta) == digest_tensors(other)


def test_the_digest_sees_every_value_name_and_shape() -> None:
    delta = sample()
    seen = {digest_tensors(delta)}
    seen.add(digest_tensors(delta | {"tail.scale": np.float32(np.nextafter(delta["tail.scale"], np.float32(1)))}))
    seen.add(digest_tensors({("z" if n == "tail.bias" else n): v for n, v in delta.items()}))
    seen.add(digest_tensors(delta | {"decoder.weight": delta["decoder.weight"].reshape(5, 7)}))
    assert len(seen) == 4


def test_untouched_tensors_cost_next_to_nothing() -> None:
    assert len(encode(zeros({"w": (1000, 900)}))) < 1000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_a_value_that_is_not_finite_in_fp16_is_not_sent(value: float) -> None:
    delta = sample()
    delta["tail.bias"][1] = value
    with pytest.raises(Refused):
        encode(delta)


@pytest.mark.parametrize(
    "shapes",
    [
        SHAPES | {"more": (1,)},
        {name: shape for name, shape in SHAPES.items() if name != "tail.scale"},
        SHAPES | {"decoder.weight": (5, 7)},
        SHAPES | {"decoder.weight": (35,)},
        {("tail.bios" if name == "tail.bias" else name): shape for name, shape in SHAPES.items()},
    ],
)
def test_other_names_or_shapes_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    refused(encode(sample()), shapes)


def test_every_truncation_and_trailing_byte_is_refused() -> None:
    data = encode(sample())
    for length in range(len(data)):
        refused(data[:length])
    refused(data + b"\0")
    refused(data + data)


def test_a_flipped_bit_is_refused_or_gives_finite_numbers_of_the_agreed_shapes() -> None:
    data = encode(sample())
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        try:
            decoded = decode(bytes(flipped), SHAPES)
        except Refused:
            continue
        assert {name: value.shape for name, value in decoded.items()} == dict(SHAPES)
        assert all(np.isfinite(value).all() for value in decoded.values())


def frame_of(payload: bytes, size_in_header: bool = True) -> bytes:
    header = encode(sample())
    start = header[: header.index(b"\x28\xb5\x2f\xfd")]
    return start + zstandard.ZstdCompressor(write_content_size=size_in_header).compress(payload)


@pytest.mark.parametrize("known", [True, False])
def test_a_compression_bomb_costs_no_memory(known: bool) -> None:
    bomb = frame_of(bytes(256 << 20), known)
    assert len(bomb) < 100_000
    tracemalloc.start()
    refused(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_frame_that_announces_its_size_falsely_is_refused() -> None:
    count = sum(int(np.prod(shape)) for shape in SHAPES.values())
    frame = bytearray(frame_of(bytes(2 * count + 2)))
    refused(bytes(frame))
    refused(frame_of(bytes(2 * count - 2)))


def test_values_that_are_not_finite_are_refused_on_arrival() -> None:
    count = sum(int(np.prod(shape)) for shape in SHAPES.values())
    refused(frame_of(bytes(count) + b"\x7c" * count))  # infinity
    refused(frame_of(b"\x01" * count + b"\x7e" * count))  # not a number


@pytest.mark.parametrize("data", [b"", b"SSPT1\n", b"\x80\x04pickle", b"SSPT1\n" + struct.pack("<I", 2**32 - 1)])
def test_what_is_no_blob_is_refused(data: bytes) -> None:
    refused(data)
