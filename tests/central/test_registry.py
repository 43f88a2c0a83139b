"""Admission, the register of sites, and publication."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from central.federation import Federation
from central.registry import AdmittedSite, Publication, SiteRegistry, publish_files
from site_client.join import create as create_site
from sspformer.contract.canonical import digest_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.joining import Admission, Request
from sspformer.contract.keys import fingerprint, public_pem
from tests.trust import MIB, make_federation, publish, tensors_file
from tests.trust import admit_request as admit
from tests.trust import admit_request_file as admit_file


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return make_federation(tmp_path / "federation")


def request_of(tmp_path: Path, name: str = "alpha") -> Path:
    """A request as `site-client init` writes it."""
    (tmp_path / "bids").mkdir(exist_ok=True)
    create_site(tmp_path / name, name=name, data=tmp_path / "bids", device="cpu")
    return tmp_path / name / "request.json"


def hand_made(name: str = "alpha", subject: str = "alpha", **changes: str) -> bytes:
    """A request made by hand, with anything in it."""
    signing = Ed25519PrivateKey.generate()
    tls = ec.generate_private_key(ec.SECP256R1())
    node = ec.generate_private_key(ec.SECP384R1()).public_key()
    names = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, subject),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "coordinator"),
        ]
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(names)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    values = {
        "name": name,
        "tls_request": builder.sign(tls, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode(),
        "node_public_key": node.public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        ).decode(),
        "signing_public_key": public_pem(signing.public_key()),
    }
    return Request(**values | changes).seal(signing)


def test_names_in_the_certificate_come_from_the_coordinator(federation):
    admission, _sealed = admit(federation, hand_made(subject="localhost"))
    certificate = x509.load_pem_x509_certificate(admission.site_certificate.encode())
    assert certificate.subject.rfc4514_string() == "CN=alpha,OU=site,O=demo"
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_admission_is_registered_and_sealed(federation, tmp_path):
    lines = admit_file(federation.root, request_of(tmp_path), tmp_path / "admission.json")
    (site,) = SiteRegistry(federation.sites_path).sites()
    own = fingerprint(federation.signing_key().public_key())
    admission, _key = Admission.verify((tmp_path / "admission.json").read_bytes(), own)
    certificate = x509.load_pem_x509_certificate(admission.site_certificate.encode())
    assert site.name == admission.site == "alpha"
    assert site.serial == f"{certificate.serial_number:x}"
    assert SiteRegistry(federation.sites_path).find(certificate.serial_number) == site
    assert SiteRegistry(federation.sites_path).find(certificate.serial_number + 1) is None
    assert site.node_public_key == (tmp_path / "alpha" / "keys" / "node.pub").read_text().strip()
    assert (admission.host, admission.gateway_port) == ("localhost", federation.config.gateway_port)
    assert own in lines[1]


def test_no_private_key_is_in_the_request_or_the_admission(federation, tmp_path):
    request = request_of(tmp_path)
    admit_file(federation.root, request, None)
    for path in (request, request.with_name("admission.json"), federation.sites_path):
        assert "PRIVATE" not in path.read_text()


def test_the_same_request_again_gives_the_same_certificate(federation, tmp_path):
    envelope = request_of(tmp_path).read_bytes()
    assert admit(federation, envelope) == admit(federation, envelope)
    assert len(SiteRegistry(federation.sites_path).sites()) == 1


@pytest.mark.parametrize(("days", "renewed"), [(300, False), (340, True), (400, True)])
def test_a_certificate_near_its_end_is_renewed_by_the_same_request(federation, monkeypatch, days, renewed):
    from central import authority, registry

    request = hand_made()
    first, _sealed = admit(federation, request)

    class Later(registry.datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + registry.datetime.timedelta(days=days)

    monkeypatch.setattr(registry.datetime, "datetime", Later)
    assert authority.datetime is registry.datetime
    second, _sealed = admit(federation, request)
    assert (second.site_certificate != first.site_certificate) == renewed
    (site,) = SiteRegistry(federation.sites_path).sites()
    assert site.certificate == second.site_certificate
    serial = x509.load_pem_x509_certificate(second.site_certificate.encode()).serial_number
    assert SiteRegistry(federation.sites_path).find(serial) == site


def test_a_name_is_taken_once(federation):
    admit(federation, hand_made())
    with pytest.raises(Refused, match="already admitted") as refusal:
        admit(federation, hand_made())
    assert refusal.value.code == Code.STATE


def test_a_node_key_belongs_to_one_site(federation, tmp_path):
    first = request_of(tmp_path)
    admit(federation, first.read_bytes())
    node = (tmp_path / "alpha" / "keys" / "node.pub").read_text()
    with pytest.raises(Refused, match="already that of site alpha"):
        admit(federation, hand_made("beta", node_public_key=node))


P256 = ec.generate_private_key(ec.SECP256R1()).public_key()
BAD_REQUESTS = {
    "node key on another curve": {
        "node_public_key": P256.public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        ).decode()
    },
    "node key is text": {"node_public_key": "hello"},
    "node key is a private key": {"node_public_key": "-----BEGIN OPENSSH PRIVATE KEY-----"},
    "TLS part is text": {"tls_request": "hello"},
    "TLS part is a bare key": {
        "tls_request": P256.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()
    },
}


def test_a_name_with_the_same_keys_but_another_tls_key_is_taken(federation):
    signing = Ed25519PrivateKey.generate()
    first = Request.verify(hand_made()).model_copy(update={"signing_public_key": public_pem(signing.public_key())})
    admit(federation, first.seal(signing))
    second = first.model_copy(update={"tls_request": Request.verify(hand_made()).tls_request})
    with pytest.raises(Refused, match="other keys"):
        admit(federation, second.seal(signing))


@pytest.mark.parametrize("change", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_request_is_refused_and_registers_nobody(federation, change):
    with pytest.raises(Refused) as refusal:
        admit(federation, hand_made(**change))
    assert refusal.value.code == Code.FORMAT
    assert SiteRegistry(federation.sites_path).sites() == []


def test_a_request_signed_by_another_key_than_it_names_is_refused(federation):
    stolen = public_pem(Ed25519PrivateKey.generate().public_key())
    with pytest.raises(Refused) as refusal:
        admit(federation, hand_made(signing_public_key=stolen))
    assert refusal.value.code == Code.SIGNATURE
    assert SiteRegistry(federation.sites_path).sites() == []


def test_a_certificate_request_whose_key_is_not_held_is_refused(federation):
    """The request's own signature is broken: whoever sends it does not hold the TLS key."""
    payload = Request.verify(hand_made()).tls_request
    request = x509.load_pem_x509_csr(payload.encode())
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    import base64

    body = base64.encodebytes(bytes(der)).decode()
    broken = f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(Refused) as refusal:
        admit(federation, hand_made(tls_request=broken))
    assert refusal.value.code == Code.FORMAT


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04pickle", b"x" * (2 * MIB)])
def test_a_file_that_is_no_request_is_refused(federation, tmp_path, content):
    path = tmp_path / "request.json"
    path.write_bytes(content)
    with pytest.raises(Refused) as refusal:
        admit_file(federation.root, path, None)
    assert refusal.value.code == Code.FORMAT
    assert not (tmp_path / "admission.json").exists()


def test_a_missing_request_is_refused(federation, tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        admit_file(federation.root, tmp_path / "none.json", None)


def test_many_admissions_at_once_all_count(federation):
    requests = [hand_made(f"site-{number}") for number in range(8)]
    threads = [threading.Thread(target=admit, args=(federation, request)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {site.name for site in SiteRegistry(federation.sites_path).sites()} == {f"site-{n}" for n in range(8)}


def test_one_name_asked_for_by_many_at_once_goes_to_one(federation):
    winners = []

    def race(request: bytes) -> None:
        try:
            winners.append(admit(federation, request))
        except Refused:
            pass

    threads = [threading.Thread(target=race, args=(hand_made(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == len(SiteRegistry(federation.sites_path).sites()) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sites":[{"name":"x"}]}', b'{"sites":3}'])
def test_a_damaged_register_is_one_refusal(federation, content):
    federation.sites_path.write_bytes(content)
    with pytest.raises(Refused, match="damaged") as refusal:
        SiteRegistry(federation.sites_path).sites()
    assert refusal.value.code == Code.STATE


def test_the_register_is_plain_json(federation):
    admit(federation, hand_made())
    (entry,) = json.loads(federation.sites_path.read_text())["sites"]
    assert set(entry) == set(AdmittedSite.model_fields)


def test_publish_copies_by_digest_and_signs(federation, tmp_path):
    publish(federation, tmp_path / "models", size=MIB)
    manifest = Publication(federation).manifest()
    for artifact, name in ((manifest.encoder, "encoder"), (manifest.head, "head")):
        blob = Publication(federation).blob_path(artifact.digest)
        assert digest_file(blob) == artifact.digest
        assert blob.read_bytes() == (tmp_path / "models" / f"{name}.safetensors").read_bytes()
        assert artifact.bytes == blob.stat().st_size
    assert manifest.sequence == 1
    publish(federation, tmp_path / "models", size=2 * MIB)
    assert Publication(federation).manifest().sequence == 2
    assert not [path for path in federation.blobs.iterdir() if path.suffix == ".tmp"]


def test_publish_reads_the_preset_that_a_checkpoint_names(federation, tmp_path):
    tiny = {"architecture": json.dumps({"name": "tiny", "width": 192})}
    encoder = tensors_file(tmp_path / "e.safetensors", 400, tiny | {"role": "encoder"})
    facts = tiny | {"role": "head", "task": "denoise", "encoder": digest_file(encoder)}
    head = tensors_file(tmp_path / "h.safetensors", 400, facts, seed=1)
    publish_files(federation.root, encoder=encoder, head=head)
    manifest = Publication(federation).manifest()
    assert (manifest.encoder.preset, manifest.head.preset, manifest.head.task) == ("tiny", "tiny", "denoise")
    with pytest.raises(Refused, match="not the encoder"):
        publish_files(federation.root, encoder=head, head=encoder)
    paper = tensors_file(tmp_path / "p.safetensors", 400, {"architecture": '{"name":"paper"}'})
    with pytest.raises(Refused, match="made together"):
        publish_files(federation.root, encoder=encoder, head=paper)


def test_publish_refuses_a_head_made_for_another_encoder(federation, tmp_path):
    tiny = {"architecture": '{"name":"tiny"}'}
    encoder, other = (tensors_file(tmp_path / f"e{seed}", 400, tiny | {"role": "encoder"}, seed) for seed in (0, 1))
    for number, stated in enumerate(({"encoder": digest_file(other)}, {}, {"encoder": ""})):
        head = tensors_file(tmp_path / f"h{number}", 400, tiny | {"role": "head"} | stated, seed=2)
        with pytest.raises(Refused, match="was made for") as refusal:
            publish_files(federation.root, encoder=encoder, head=head)
        assert refusal.value.code == Code.FORMAT
    publish_files(federation.root, encoder=other, head=tmp_path / "h0")  # and its own encoder is accepted


def test_publish_of_a_missing_file_is_one_refusal(federation, tmp_path):
    with pytest.raises(Refused, match="cannot be read") as refusal:
        publish_files(federation.root, encoder=tmp_path / "none", head=tmp_path / "none")
    assert refusal.value.code == Code.STATE


def test_nothing_published_says_what_to_do(federation):
    with pytest.raises(Refused, match="Nothing is published"):
        Publication(federation).manifest()
