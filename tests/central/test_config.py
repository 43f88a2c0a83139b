"""central.yaml and the coordinator's folder."""

from __future__ import annotations

import ipaddress
import stat

import pytest
from cryptography import x509

from central.config import CentralConfig
from central.federation import Federation, create
from sspformer.contract.errors import Code, Refused
from sspformer.contract.keys import fingerprint

OPTIONS = {"name": "demo", "host": "localhost", "gateway_port": 8443, "superlink_port": 8444}


def test_init_makes_a_folder_that_opens(tmp_path):
    lines = create(tmp_path / "state", **OPTIONS)
    federation = Federation.open(tmp_path / "state")
    assert federation.config == CentralConfig(**OPTIONS, bind="127.0.0.1")
    assert any(fingerprint(federation.signing_key().public_key()) in line for line in lines)
    assert federation.authority().certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_keys_are_secret(tmp_path):
    create(tmp_path / "state", **OPTIONS)
    federation = Federation.open(tmp_path / "state")
    assert stat.S_IMODE(federation.keys.stat().st_mode) == 0o700
    secrets = [federation.signing_key_path, federation.ca_key_path, federation.server_key_path]
    for path in [*secrets, federation.superexec_secret_path]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert len(federation.superexec_secret_path.read_bytes()) == 64


@pytest.mark.parametrize("host", ["localhost", "central.example.org", "192.0.2.7", "2001:db8::7"])
def test_the_server_certificate_is_for_its_host_and_for_loopback(tmp_path, host):
    create(tmp_path / "state", **OPTIONS | {"host": host})
    federation = Federation.open(tmp_path / "state")
    certificate = x509.load_pem_x509_certificate(federation.server_certificate_path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = names.get_values_for_type(x509.DNSName)
    addresses = names.get_values_for_type(x509.IPAddress)
    assert "localhost" in dns
    assert ipaddress.ip_address("127.0.0.1") in addresses
    assert host in [*dns, *map(str, addresses)]
    certificate.verify_directly_issued_by(federation.authority().certificate)
    assert federation.config.bind == ("127.0.0.1" if host == "localhost" else "0.0.0.0")


def test_init_refuses_to_overwrite(tmp_path):
    create(tmp_path / "state", **OPTIONS)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(Refused, match="not overwritten") as refusal:
        create(tmp_path / "state", **OPTIONS)
    assert refusal.value.code == Code.STATE
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_init_that_was_cut_short_is_not_taken_for_whole(tmp_path):
    (tmp_path / "state" / "keys").mkdir(parents=True)
    with pytest.raises(Refused, match="already holds"):
        create(tmp_path / "state", **OPTIONS)
    with pytest.raises(Refused, match=r"central\.yaml"):
        Federation.open(tmp_path / "state")


BAD = {
    "name": ({"name": "Bad Name"}, "--name"),
    "host": ({"host": "a b"}, "--host"),
    "port": ({"gateway_port": 0}, "--gateway-port"),
    "same ports": ({"gateway_port": 8444}, "must differ"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD.keys())
def test_init_refuses_bad_options_and_makes_nothing(tmp_path, change, words):
    with pytest.raises(Refused, match=words) as refusal:
        create(tmp_path / "state", **OPTIONS | change)
    assert refusal.value.code == Code.CONFIG
    assert not (tmp_path / "state").exists()


def test_a_misspelt_key_is_named_with_its_line(tmp_path):
    create(tmp_path / "state", **OPTIONS)
    path = tmp_path / "state" / "central.yaml"
    path.write_text(path.read_text().replace("superlink_port", "superlink_prot"))
    with pytest.raises(Refused, match=r"central\.yaml, line \d: key 'superlink_p") as refusal:
        Federation.open(tmp_path / "state")
    assert refusal.value.code == Code.CONFIG


def test_a_folder_that_cannot_be_made_is_one_refusal(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be made"):
        create(tmp_path / "file" / "state", **OPTIONS)


def test_another_federations_authority_key_is_noticed(tmp_path):
    create(tmp_path / "one", **OPTIONS)
    create(tmp_path / "two", **OPTIONS)
    one, two = Federation.open(tmp_path / "one"), Federation.open(tmp_path / "two")
    one.ca_key_path.write_bytes(two.ca_key_path.read_bytes())
    with pytest.raises(Refused, match="authority"):
        one.authority()
