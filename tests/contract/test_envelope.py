"""Sealing and opening; the attacks are in tests/attacks/test_envelope.py."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from sspformer.contract.envelope import MAX_BYTES, read_unverified, seal, verify
from sspformer.contract.errors import Code, Refused
from sspformer.contract.keys import key_id
from tests.contract.test_canonical import TEXT, VALUES

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
PAYLOADS = st.dictionaries(TEXT, VALUES, max_size=5)


@given(PAYLOADS)
def test_what_is_sealed_opens(payload):
    envelope = seal("plan", payload, KEY)
    assert verify(envelope, "plan", [OTHER.public_key(), KEY.public_key()]) == payload
    assert read_unverified(envelope, "plan") == payload


@given(PAYLOADS, st.data())
def test_every_byte_matters(payload, data):
    envelope = bytearray(seal("plan", payload, KEY))
    position = data.draw(st.integers(0, len(envelope) - 1))
    envelope[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Refused) as refusal:
        verify(bytes(envelope), "plan", [KEY.public_key()])
    assert refusal.value.code in (Code.FORMAT, Code.SIGNATURE)


@given(PAYLOADS, st.data())
def test_every_truncation_is_refused(payload, data):
    envelope = seal("plan", payload, KEY)
    with pytest.raises(Refused):
        verify(envelope[: data.draw(st.integers(0, len(envelope) - 1))], "plan", [KEY.public_key()])


@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    with pytest.raises(Refused):
        verify(data, "plan", [KEY.public_key()])


def test_the_format_is_fixed():
    """A stored envelope must open in every later version: its bytes are pinned here."""
    envelope = seal("plan", {"run": "r1", "rounds": 3}, KEY)
    fields = json.loads(envelope)
    assert list(fields) == ["key_id", "kind", "payload", "signature"]
    assert fields["key_id"] == key_id(KEY.public_key()) == "56475aa75463474c"
    assert fields["signature"][:32] == "0e3b8f5a69887c6901d6e181456ddf71"


def test_too_large_a_payload_is_not_sealed():
    with pytest.raises(Refused, match="too large"):
        seal("plan", {"x": "x" * MAX_BYTES}, KEY)


@pytest.mark.parametrize("kind", ["", "Plan", "a b", "x" * 40, "plan\0"])
def test_a_kind_is_a_plain_word(kind):
    with pytest.raises(ValueError, match="kind"):
        seal(kind, {}, KEY)
