"""Attacks on sealed messages. Each rule has a twin test that takes it away and shows the attack succeed."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sspformer.contract import envelope as envelope_module
from sspformer.contract.canonical import canonical_bytes
from sspformer.contract.envelope import seal, verify
from sspformer.contract.errors import Code, Refused

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
TRUSTED = [KEY.public_key()]
PLAN = {"rounds": 3, "private": {"noise_multiplier": 1.31}}


def refused(envelope: bytes, kind: str = "plan") -> Code:
    with pytest.raises(Refused) as refusal:
        verify(envelope, kind, TRUSTED)
    return refusal.value.code


def changed(envelope: bytes, **fields: object) -> bytes:
    """The envelope with some of its fields replaced, spelt canonically."""
    return canonical_bytes(json.loads(envelope) | fields)


def test_an_envelope_of_one_kind_does_not_pass_for_another():
    assert refused(seal("round", PLAN, KEY)) == Code.SIGNATURE


def test_it_passes_without_the_kind_check(monkeypatch):
    monkeypatch.setattr(envelope_module, "_check_kind", lambda *_: None)
    assert verify(seal("round", PLAN, KEY), "plan", TRUSTED) == PLAN


def test_renaming_the_kind_breaks_the_signature():
    assert refused(changed(seal("round", PLAN, KEY), kind="plan")) == Code.SIGNATURE


def test_a_changed_payload_is_refused():
    weaker = {"rounds": 3, "private": {"noise_multiplier": 0.01}}
    assert refused(changed(seal("plan", PLAN, KEY), payload=weaker)) == Code.SIGNATURE


def test_a_changed_payload_passes_without_the_signature_check(monkeypatch):
    monkeypatch.setattr(envelope_module, "_check_signature", lambda *_: None)
    weaker = {"rounds": 3, "private": {"noise_multiplier": 0.01}}
    assert verify(changed(seal("plan", PLAN, KEY), payload=weaker), "plan", TRUSTED) == weaker


def test_a_stranger_who_names_the_trusted_key_is_refused():
    own = json.loads(seal("plan", PLAN, KEY))
    forged = seal("plan", PLAN, Ed25519PrivateKey.generate())
    assert refused(forged) == Code.SIGNATURE
    assert refused(changed(forged, key_id=own["key_id"])) == Code.SIGNATURE


def test_nobody_is_trusted_when_no_key_is_pinned():
    with pytest.raises(Refused) as refusal:
        verify(seal("plan", PLAN, KEY), "plan", [])
    assert refusal.value.code == Code.SIGNATURE


def test_a_plain_ed25519_signature_over_the_payload_is_not_a_seal():
    """The domain in front keeps signatures made for other purposes from counting here."""
    fields = json.loads(seal("plan", PLAN, KEY))
    del fields["signature"]
    bare = KEY.sign(canonical_bytes(fields)).hex()
    assert refused(canonical_bytes(fields | {"signature": bare})) == Code.SIGNATURE


def test_it_passes_without_the_domain(monkeypatch):
    monkeypatch.setattr(envelope_module, "_DOMAIN", b"")
    fields = json.loads(seal("plan", PLAN, KEY))
    del fields["signature"]
    bare = KEY.sign(canonical_bytes(fields)).hex()
    assert verify(canonical_bytes(fields | {"signature": bare}), "plan", TRUSTED) == PLAN


OTHER_SPELLINGS = {
    "white space": lambda e: e.replace(b'"payload":', b'"payload": '),
    "line end": lambda e: e + b"\n",
    "upper-case hex": lambda e: changed(e, signature=json.loads(e)["signature"].upper()),
    "order of keys": lambda e: json.dumps(dict(reversed(json.loads(e).items())), separators=(",", ":")).encode(),
    "repeated key": lambda e: e.replace(b'"rounds":3', b'"rounds":9,"rounds":3'),
    "escape": lambda e: e.replace(b'"rounds"', b'"round\\u0073"'),
    "long float": lambda e: e.replace(b"1.31", b"1.310"),
    "byte order mark": lambda e: b"\xef\xbb\xbf" + e,
    "extra field": lambda e: changed(e, note="hello"),
    "UTF-16": lambda e: e.decode().encode("utf-16"),
}


@pytest.mark.parametrize("respell", OTHER_SPELLINGS.values(), ids=OTHER_SPELLINGS.keys())
def test_one_payload_has_one_spelling(respell):
    envelope = seal("plan", PLAN, KEY)
    other = respell(envelope)
    assert other != envelope
    assert refused(other) == Code.FORMAT


@pytest.mark.parametrize("name", ["white space", "line end", "order of keys", "escape", "long float"])
def test_other_spellings_pass_without_the_check(monkeypatch, name):
    monkeypatch.setattr(envelope_module, "_check_spelling", lambda *_: None)
    assert verify(OTHER_SPELLINGS[name](seal("plan", PLAN, KEY)), "plan", TRUSTED) == PLAN


BOMBS = {
    "empty": b"",
    "not JSON": b"\x80\x04hello",
    "a list": b"[]",
    "a number": b"1",
    "infinity": b'{"kind":"plan","key_id":"","payload":{"x":Infinity},"signature":""}',
    "1e999": b'{"kind":"plan","key_id":"","payload":{"x":1e999},"signature":""}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep list": b"[" * 500_000,
    "many digits": b'{"kind":' + b"9" * 100_000 + b"}",
    "too large": b'{"kind":"' + b"x" * (envelope_module.MAX_BYTES) + b'"}',
    "wrong types": b'{"key_id":1,"kind":"plan","payload":{},"signature":"00"}',
    "payload is a list": b'{"key_id":"a","kind":"plan","payload":[],"signature":"' + b"0" * 128 + b'"}',
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_what_is_not_an_envelope_is_one_refusal(data):
    assert refused(data) == Code.FORMAT
