"""Canonical bytes: one spelling per value, nothing without one."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sspformer.contract.canonical import canonical_bytes, digest, digest_file, parse
from sspformer.contract.errors import Code, Refused

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def same(one: object, other: object) -> bool:
    """Equality that also tells 1 from 1.0 and from True."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(VALUES)
def test_a_value_reads_back_and_has_one_spelling(value):
    data = canonical_bytes(value)
    back = parse(data, "the value", max_bytes=1 << 20)
    assert same(back, value)
    assert canonical_bytes(back) == data


@given(st.dictionaries(TEXT, VALUES, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert canonical_bytes(dict(items)) == canonical_bytes(value)


@given(VALUES, VALUES)
def test_different_values_have_different_bytes(one, other):
    assert (canonical_bytes(one) == canonical_bytes(other)) == same(one, other) or signed_zero(one, other)


def signed_zero(one: object, other: object) -> bool:
    """0.0 and -0.0 are equal numbers with two spellings."""
    return "-0.0" in repr(one) + repr(other)


def test_the_exact_bytes_never_change():
    value = {"b": [1, 1.5, True, None], "a": "µ\n", "é": {}, "z": ("x",)}
    assert canonical_bytes(value) == '{"a":"µ\\n","b":[1,1.5,true,null],"z":["x"],"é":{}}'.encode()


BAD = {
    "NaN": math.nan,
    "infinity": [math.inf],
    "minus infinity": {"x": -math.inf},
    "bytes": b"x",
    "set": {1},
    "key": {1: 2},
    "surrogate": "\ud800",
    "object": object(),
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(Refused) as refusal:
        canonical_bytes(value)
    assert refusal.value.code == Code.FORMAT


def test_nesting_is_bounded():
    value: list[object] = []
    for _ in range(40):
        value = [value]
    with pytest.raises(Refused, match="deep"):
        canonical_bytes(value)


@given(st.binary(max_size=60))
def test_parse_refuses_or_reads_but_never_breaks(data):
    try:
        value = parse(data, "the bytes", max_bytes=50)
    except Refused:
        return
    assert len(data) <= 50
    assert same(json.loads(data), value)


@pytest.mark.parametrize("data", [b'{"a":1,"a":2}', b"NaN", b"-Infinity", b"1e400", b'"\\ud800"x', b"{", b"\xff"])
def test_parse_is_strict(data):
    with pytest.raises(Refused) as refusal:
        parse(data, "the bytes", max_bytes=100)
    assert refusal.value.code == Code.FORMAT


def test_digest_of_bytes_and_of_a_file(tmp_path):
    data = bytes(range(256)) * 10_000  # more than one piece
    path = tmp_path / "file"
    path.write_bytes(data)
    assert digest(data) == digest_file(path) == "sha256:" + hashlib.sha256(data).hexdigest()
