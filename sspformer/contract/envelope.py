"""Signed envelopes: a payload, what kind it is, and an Ed25519 signature over both.

The signature covers a fixed domain, then the canonical bytes of ``{"key_id", "kind", "payload"}``. An envelope is
itself canonical JSON, so that one sealed payload has exactly one spelling and every byte of it matters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sspformer.contract.canonical import canonical_bytes, parse
from sspformer.contract.errors import Code, Refused
from sspformer.contract.keys import key_id

MAX_BYTES = 1 << 20
_DOMAIN = b"sspformer-onsite envelope v1\0"
_KIND = re.compile(r"[a-z][a-z-]{0,31}")
_FIELDS = {"kind", "key_id", "payload", "signature"}
_SIGNATURE_BYTES = 64


def seal(kind: str, payload: dict[str, Any], key: Ed25519PrivateKey) -> bytes:
    """Sign a payload.

    Args:
        kind: what the payload is ("manifest", "plan", "round", ...); an envelope of one kind never passes for another.
        payload: a dict that has a canonical form.
        key: the sealer's private key.

    Returns:
        The envelope: canonical JSON, at most 1 MiB.

    Raises:
        Refused: E-FORMAT when the payload has no canonical form or is too large.
    """
    if not _KIND.fullmatch(kind):
        raise ValueError(f"not a kind of envelope: {kind!r}")
    signed = {"kind": kind, "key_id": key_id(key.public_key()), "payload": payload}
    signature = key.sign(_DOMAIN + canonical_bytes(signed)).hex()
    envelope = canonical_bytes(signed | {"signature": signature})
    if len(envelope) > MAX_BYTES:
        raise Refused(Code.FORMAT, f"A {kind} of {len(envelope)} bytes is too large to seal.", "Make it smaller.")
    return envelope


def verify(envelope: bytes, kind: str, trusted: Iterable[Ed25519PublicKey]) -> dict[str, Any]:
    """Check an envelope and return its payload. Nothing of the payload is used before the signature holds.

    Args:
        envelope: the bytes as received.
        kind: what the reader expects.
        trusted: the keys that the reader trusts for it.

    Raises:
        Refused: E-FORMAT when the bytes are not an envelope; E-SIGNATURE when no trusted key signed this payload
            as this kind.
    """
    fields = _open(envelope, kind)
    _check_kind(fields, kind)
    _check_signature(fields, kind, trusted)
    payload: dict[str, Any] = fields["payload"]
    return payload


def read_unverified(envelope: bytes, kind: str) -> dict[str, Any]:
    """Return the payload of a well-formed envelope WITHOUT trusting it.

    Only for first contact, where the payload brings the very key that :func:`verify` is then called with.

    Raises:
        Refused: E-FORMAT when the bytes are not an envelope.
    """
    payload: dict[str, Any] = _open(envelope, kind)["payload"]
    return payload


def _open(envelope: bytes, kind: str) -> dict[str, Any]:
    fields = parse(envelope, f"the {kind}", max_bytes=MAX_BYTES)
    if not isinstance(fields, dict) or set(fields) != _FIELDS or not isinstance(fields["payload"], dict):
        raise _malformed(kind)
    texts = (fields["kind"], fields["key_id"], fields["signature"])
    if not all(isinstance(text, str) for text in texts):
        raise _malformed(kind)
    if not re.fullmatch(rf"[0-9a-f]{{{2 * _SIGNATURE_BYTES}}}", fields["signature"]):
        raise _malformed(kind)
    _check_spelling(fields, envelope, kind)
    return fields


def _check_spelling(fields: dict[str, Any], envelope: bytes, kind: str) -> None:
    if canonical_bytes(fields) != envelope:
        raise _malformed(kind)


def _check_kind(fields: dict[str, Any], kind: str) -> None:
    if fields["kind"] != kind:
        raise _untrusted(kind, "is sealed as another kind of message")


def _check_signature(fields: dict[str, Any], kind: str, trusted: Iterable[Ed25519PublicKey]) -> None:
    signed = canonical_bytes({name: value for name, value in fields.items() if name != "signature"})
    for key in trusted:
        if key_id(key) == fields["key_id"]:
            try:
                key.verify(bytes.fromhex(fields["signature"]), _DOMAIN + signed)
                return
            except InvalidSignature:
                raise _untrusted(kind, "does not match its signature") from None
    raise _untrusted(kind, "is signed by a key that is not trusted here")


def _malformed(kind: str) -> Refused:
    return Refused(
        Code.FORMAT, f"The {kind} is not a sealed envelope.", "Ask the sender for the file exactly as it was written."
    )


def _untrusted(kind: str, why: str) -> Refused:
    return Refused(
        Code.SIGNATURE,
        f"The {kind} {why}.",
        "Do not use it; ask its sender by phone and compare the key's fingerprint.",
    )
