"""Keys on disk and their names."""

from __future__ import annotations

import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sspformer.contract import keys
from sspformer.contract.errors import Code, Refused


@pytest.fixture
def key():
    return Ed25519PrivateKey.generate()


def test_a_private_key_reads_back_and_is_secret(tmp_path, key):
    keys.save_private(tmp_path / "k.pem", key)
    assert keys.load_private(tmp_path / "k.pem").private_bytes_raw() == key.private_bytes_raw()
    assert stat.S_IMODE((tmp_path / "k.pem").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["k.pem"]


def test_a_private_key_that_others_may_read_is_refused(tmp_path, key):
    keys.save_private(tmp_path / "k.pem", key)
    (tmp_path / "k.pem").chmod(0o640)
    with pytest.raises(Refused, match="other users") as refusal:
        keys.load_private(tmp_path / "k.pem")
    assert "chmod 600" in refusal.value.next_step


def test_a_public_key_reads_back(tmp_path, key):
    keys.save_public(tmp_path / "k.pub", key.public_key())
    assert keys.load_public(tmp_path / "k.pub").public_bytes_raw() == key.public_key().public_bytes_raw()


@pytest.mark.parametrize("content", [None, b"", b"not a key", b"\xff\xfe"])
def test_a_missing_or_damaged_key_is_one_refusal(tmp_path, content):
    path = tmp_path / "k.pem"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    for load in (keys.load_private, keys.load_public):
        with pytest.raises(Refused) as refusal:
            load(path)
        assert refusal.value.code == Code.STATE
        assert str(path) in refusal.value.what


def test_a_key_of_another_kind_is_refused():
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(Refused) as refusal:
        keys.parse_public(pem)
    assert refusal.value.code == Code.FORMAT


def test_a_fingerprint_survives_being_read_out(key):
    digits = keys.fingerprint(key.public_key())
    assert len(digits) == 32
    spoken = " ".join(digits[i : i + 4] for i in range(0, 32, 4)).upper()
    assert keys.same_fingerprint(key.public_key(), spoken)
    assert keys.same_fingerprint(key.public_key(), f"  {digits} ")
    assert keys.key_id(key.public_key()) == digits[:16]


@pytest.mark.parametrize("cut", [0, 8, 16, 31])
def test_a_part_of_a_fingerprint_is_not_enough(key, cut):
    assert not keys.same_fingerprint(key.public_key(), keys.fingerprint(key.public_key())[:cut])
