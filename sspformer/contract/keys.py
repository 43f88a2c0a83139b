"""Ed25519 signing keys: made, kept, named."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sspformer.contract.durable import read_secret, write_file, write_secret
from sspformer.contract.errors import Code, Refused

_FINGERPRINT_DIGITS = 32  # 128 bits: no one finds a second key with the same fingerprint
_KEY_ID_DIGITS = 16  # a name to look a key up by; trust never rests on it


def save_private(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a private key as PEM (PKCS 8), mode 0600."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_secret(path, pem)


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        Refused: E-STATE when the file is missing, open to other users, or not an Ed25519 key.
    """
    pem = read_secret(path, "the signing key")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise Refused(
            Code.STATE, f"{path} is not an Ed25519 private key.", "Restore it from the backup of this folder."
        )
    return key


def save_public(path: Path, key: Ed25519PublicKey) -> None:
    """Write a public key as PEM."""
    write_file(path, public_pem(key).encode())


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        Refused: E-STATE when the file is missing or not an Ed25519 key.
    """
    try:
        return parse_public(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(
            Code.STATE,
            f"{path} cannot be read ({error.strerror}).",
            "Run `site-client accept` with the coordinator's admission first.",
        ) from None
    except (Refused, ValueError):
        raise Refused(
            Code.STATE, f"{path} is not an Ed25519 public key.", "Restore it from the backup of this folder."
        ) from None


def public_pem(key: Ed25519PublicKey) -> str:
    """Return a public key as PEM text."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def parse_public(pem: str) -> Ed25519PublicKey:
    """Read a public key from PEM text.

    Raises:
        Refused: E-FORMAT when the text is not an Ed25519 public key.
    """
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise Refused(Code.FORMAT, "A signing key is not an Ed25519 public key.", "Ask the sender for a new file.")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return 32 hexadecimal digits (128 bits) that two people can read out to compare a key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:_FINGERPRINT_DIGITS]


def same_fingerprint(key: Ed25519PublicKey, spoken: str) -> bool:
    """Say whether a fingerprint, as a person typed it (any case, spaces, colons or dashes), is this key's."""
    digits = "".join(c for c in spoken.lower() if c not in " :-")
    return digits == fingerprint(key)


def key_id(key: Ed25519PublicKey) -> str:
    """Return the 16 hexadecimal digits by which an envelope names its key."""
    return fingerprint(key)[:_KEY_ID_DIGITS]
