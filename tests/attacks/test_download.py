"""Attacks on the download, over the real gateway and real TLS.

Each attack is a function. One test runs it against the product and expects a refusal; its twin takes the rule away and
expects the attack to succeed, which proves that the first test can fail.
"""

from __future__ import annotations

import pickle
import shutil
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from central.authority import certificate_pem, key_pem
from central.federation import Federation
from central.gateway import server as gateway_server
from central.gateway import service as gateway_service
from central.registry import Publication, SiteRegistry
from site_client import gateway_client
from site_client.folder import SiteFolder
from sspformer.contract import artifact as artifact_module
from sspformer.contract import envelope as envelope_module
from sspformer.contract.artifact import Header
from sspformer.contract.canonical import digest
from sspformer.contract.durable import write_secret
from sspformer.contract.envelope import seal
from sspformer.contract.errors import Code, Refused
from sspformer.contract.manifest import Artifact, seal_manifest
from tests.trust import MIB, client, join, make_federation, publish, serving


@dataclass
class World:
    """A federation with one joined site."""

    federation: Federation
    site: SiteFolder

    @property
    def encoder(self) -> Artifact:
        return Publication(self.federation).manifest().encoder

    def blob(self) -> Path:
        """The published encoder's file at the coordinator."""
        return Publication(self.federation).blob_path(self.encoder.digest)

    def publish_by_hand(self, data: bytes) -> Artifact:
        """Publish bytes that `central publish` would refuse, properly signed: a coordinator that means ill."""
        held = Publication(self.federation).manifest()
        bad = held.encoder.model_copy(update={"digest": digest(data), "bytes": len(data)})
        Publication(self.federation).blob_path(bad.digest).write_bytes(data)
        manifest = held.model_copy(update={"artifacts": [bad, held.head], "sequence": held.sequence + 1})
        self.federation.manifest_path.write_bytes(seal_manifest(manifest, self.federation.signing_key()))
        return bad


@pytest.fixture
def world(tmp_path: Path) -> World:
    federation = make_federation(tmp_path / "federation")
    publish(federation, tmp_path / "models", size=2 * MIB)
    return World(federation, join(federation, tmp_path / "site"))


def fetch(world: World, site: SiteFolder | None = None) -> Path:
    """What `site-client fetch` does, for the encoder alone."""
    with serving(world.federation) as port, client(site or world.site, port) as gateway:
        manifest, _envelope = gateway.fetch_manifest()
        return gateway.fetch_blob(manifest.encoder)


def refused(world: World, code: Code, site: SiteFolder | None = None) -> Refused:
    """Expect a refusal with this code, and nothing left in the store."""
    with pytest.raises(Refused) as refusal:
        fetch(world, site)
    assert refusal.value.code == code
    assert [path.name for path in world.site.store.iterdir() if path.name.startswith("sha256-")] == []
    return refusal.value


# --- bytes that are not the signed ones ---


def flip_a_byte(world: World) -> None:
    data = bytearray(world.blob().read_bytes())
    data[len(data) // 2] ^= 1
    world.blob().write_bytes(data)


def test_a_flipped_byte_is_refused(world):
    flip_a_byte(world)
    refused(world, Code.DIGEST)


def test_a_flipped_byte_passes_without_the_digest_check(world, monkeypatch):
    expected = world.encoder.digest
    flip_a_byte(world)
    monkeypatch.setattr(gateway_client, "digest_file", lambda _path: expected)
    assert fetch(world).read_bytes() == world.blob().read_bytes()


def test_bytes_beyond_the_signed_length_are_refused_before_they_fill_the_disk(world):
    with world.blob().open("ab") as file:
        file.write(bytes(8 * MIB))
    refused(world, Code.DIGEST)


def test_a_file_that_is_too_short_never_becomes_an_artifact(world):
    with world.blob().open("r+b") as file:
        file.truncate(MIB)
    with pytest.raises(Refused) as refusal:
        fetch(world)
    assert refusal.value.code == Code.GATEWAY
    assert not world.site.artifact_path(world.encoder).exists()


# --- a manifest that the coordinator did not sign ---


def forge_the_manifest(world: World) -> None:
    manifest = Publication(world.federation).manifest()
    world.federation.manifest_path.write_bytes(seal_manifest(manifest, Ed25519PrivateKey.generate()))


def test_a_wrong_signature_is_refused(world):
    forge_the_manifest(world)
    refused(world, Code.SIGNATURE)


def test_a_wrong_signature_passes_without_the_signature_check(world, monkeypatch):
    expected = world.blob().read_bytes()
    forge_the_manifest(world)
    monkeypatch.setattr(envelope_module, "_check_signature", lambda *_: None)
    with serving(world.federation) as port, client(world.site, port) as gateway:
        manifest, _envelope = gateway.fetch_manifest()
        assert gateway.fetch_blob(manifest.encoder).read_bytes() == expected


def test_a_plan_does_not_pass_for_a_manifest(world):
    payload = Publication(world.federation).manifest().model_dump(mode="json")
    world.federation.manifest_path.write_bytes(seal("plan", payload, world.federation.signing_key()))
    refused(world, Code.SIGNATURE)


def replay_the_first_manifest(world: World, gateway: gateway_client.GatewayClient) -> None:
    """The site holds manifest 2; the network, or an old backup, brings manifest 1 back."""
    first = world.federation.manifest_path.read_bytes()
    publish(world.federation, world.site.root.parent / "models", size=MIB)
    manifest, envelope = gateway.fetch_manifest()
    assert manifest.sequence == 2
    world.site.manifest_path.write_bytes(envelope)
    world.federation.manifest_path.write_bytes(first)


def test_an_older_manifest_is_refused(world):
    with serving(world.federation) as port, client(world.site, port) as gateway:
        replay_the_first_manifest(world, gateway)
        with pytest.raises(Refused, match="older") as refusal:
            gateway.fetch_manifest()
    assert refusal.value.code == Code.SIGNATURE


def test_an_older_manifest_passes_without_the_check(world, monkeypatch):
    monkeypatch.setattr(gateway_client, "_check_not_older", lambda *_: None)
    with serving(world.federation) as port, client(world.site, port) as gateway:
        replay_the_first_manifest(world, gateway)
        assert gateway.fetch_manifest()[0].sequence == 1


# --- a signed artifact that is not what it must be ---


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("the pickle ran",))


PICKLES = {
    "bare": pickle.dumps(_Bomb()),
    "old protocol": pickle.dumps(_Bomb(), protocol=0),
    "torch.save": b"PK\x03\x04" + bytes(100),
    "gzip": b"\x1f\x8b\x08" + bytes(100),
}
OVERSIZED = {
    "announced": struct.pack("<Q", 1 << 62) + b"{}",
    "real": struct.pack("<Q", artifact_module.MAX_HEADER_BYTES + 1) + b"{" + b" " * artifact_module.MAX_HEADER_BYTES,
}


@pytest.mark.parametrize("data", PICKLES.values(), ids=PICKLES.keys())
def test_a_pickle_is_refused(world, data, capfd):
    world.publish_by_hand(data)
    refused(world, Code.FORMAT)
    assert "the pickle ran" not in capfd.readouterr().out


@pytest.mark.parametrize("data", OVERSIZED.values(), ids=OVERSIZED.keys())
def test_an_oversized_header_is_refused(world, data):
    world.publish_by_hand(data)
    refused(world, Code.FORMAT)


@pytest.mark.parametrize("data", [PICKLES["bare"], OVERSIZED["announced"]], ids=["pickle", "header"])
def test_a_pickle_or_a_header_passes_without_the_format_check(world, monkeypatch, data):
    world.publish_by_hand(data)
    monkeypatch.setattr(gateway_client, "read_header", lambda _path, _name: Header({}, {}, 0))
    assert fetch(world).read_bytes() == data


@pytest.mark.parametrize("data", [*PICKLES.values(), *OVERSIZED.values()])
def test_the_coordinator_does_not_publish_them_either(world, tmp_path, data):
    bad = tmp_path / "encoder.bin"
    bad.write_bytes(data)
    before = world.federation.manifest_path.read_bytes()
    with pytest.raises(Refused) as refusal:
        Publication(world.federation).publish(encoder=bad, head=tmp_path / "models" / "head.safetensors")
    assert refusal.value.code == Code.FORMAT
    assert world.federation.manifest_path.read_bytes() == before


# --- a caller that is not an admitted site ---


def call_without_certificate(world: World, port: int) -> bytes:
    credentials = grpc.ssl_channel_credentials(world.federation.ca_certificate_path.read_bytes())
    return _manifest_with(credentials, port)


def _manifest_with(credentials: grpc.ChannelCredentials, port: int) -> bytes:
    from sspformer.contract import gateway_pb2, gateway_pb2_grpc

    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        return stub.FetchManifest(gateway_pb2.ManifestRequest(), timeout=5).envelope


def test_no_client_certificate_is_refused_by_tls(world):
    with serving(world.federation) as port, pytest.raises(grpc.RpcError) as error:
        call_without_certificate(world, port)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def optional_client_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    original = grpc.ssl_server_credentials

    def weak(pairs, root_certificates, require_client_auth):
        return original(pairs)

    monkeypatch.setattr(gateway_server.grpc, "ssl_server_credentials", weak)


def no_check_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_service.AdmittedOnly, "_check", lambda _self, _context: None)


def test_without_tls_rule_the_register_still_refuses(world, monkeypatch):
    optional_client_certificate(monkeypatch)
    with serving(world.federation) as port, pytest.raises(grpc.RpcError) as error:
        call_without_certificate(world, port)
    assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert error.value.details() == "E-GATEWAY"  # the code crosses, nothing else


def test_no_client_certificate_passes_without_both_rules(world, monkeypatch):
    optional_client_certificate(monkeypatch)
    no_check_per_call(monkeypatch)
    with serving(world.federation) as port:
        assert call_without_certificate(world, port) == world.federation.manifest_path.read_bytes()


def with_certificate_of(world: World, other: Federation) -> SiteFolder:
    """A copy of the site whose TLS certificate another federation's authority issued for the same name."""
    root = world.site.root.parent / "copy"
    shutil.copytree(world.site.root, root)
    copy = replace(world.site, root=root)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = other.authority().issue_site(key.public_key(), "alpha", other.config.name)
    write_secret(copy.tls_key_path, key_pem(key))
    copy.tls_certificate_path.write_bytes(certificate_pem(certificate))
    return copy


def test_another_authoritys_certificate_is_refused_by_tls(world, tmp_path):
    other = make_federation(tmp_path / "other")
    refusal = refused(world, Code.GATEWAY, with_certificate_of(world, other))
    assert "unavailable" in refusal.what  # TLS ended it: no call reached the service


def test_another_authoritys_certificate_passes_without_both_rules(world, tmp_path, monkeypatch):
    other = make_federation(tmp_path / "other")
    imposter = with_certificate_of(world, other)
    roots = world.federation.ca_certificate_path.read_bytes() + other.ca_certificate_path.read_bytes()
    original = grpc.ssl_server_credentials
    monkeypatch.setattr(
        gateway_server.grpc,
        "ssl_server_credentials",
        lambda pairs, root_certificates, require_client_auth: original(pairs, roots, require_client_auth),
    )
    refusal = refused(world, Code.GATEWAY, imposter)
    assert "does not know" in refusal.what  # TLS let it through; the register stopped it
    no_check_per_call(monkeypatch)
    assert fetch(world, imposter).exists()


def test_a_certificate_that_is_not_admitted_is_refused(world):
    stranger = with_certificate_of(world, world.federation)  # the right authority, but never admitted
    refusal = refused(world, Code.GATEWAY, stranger)
    assert "does not know" in refusal.what


def test_a_certificate_that_is_not_admitted_passes_without_the_check_per_call(world, monkeypatch):
    no_check_per_call(monkeypatch)
    assert fetch(world, with_certificate_of(world, world.federation)).exists()


def test_a_site_taken_off_the_register_is_cut_on_an_open_channel(world):
    with serving(world.federation) as port, client(world.site, port) as gateway:
        gateway.fetch_manifest()
        world.federation.sites_path.write_bytes(b'{"sites":[]}')
        with pytest.raises(Refused, match="does not know"):
            gateway.fetch_manifest()


def test_a_damaged_register_admits_nobody(world):
    world.federation.sites_path.write_bytes(b'{"sites":')
    refused(world, Code.GATEWAY)


def test_a_certificate_that_ran_out_is_not_admitted(world, monkeypatch):
    from central import registry

    serial = int(SiteRegistry(world.federation.sites_path).sites()[0].serial, 16)
    assert SiteRegistry(world.federation.sites_path).find(serial)

    class Later(registry.datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + registry.datetime.timedelta(days=400)

    monkeypatch.setattr(registry.datetime, "datetime", Later)
    assert SiteRegistry(world.federation.sites_path).find(serial) is None


# --- something that is not the coordinator ---


def test_another_federations_gateway_is_refused(world, tmp_path):
    other = make_federation(tmp_path / "other")
    with serving(other) as port, client(world.site, port) as gateway, pytest.raises(Refused) as refusal:
        gateway.fetch_manifest()
    assert refusal.value.code == Code.GATEWAY
    assert "no certificate of this federation" in refusal.value.what


def test_it_is_reached_when_the_pinned_authority_is_not_the_federations(world, tmp_path):
    other = make_federation(tmp_path / "other")
    shutil.copy(other.ca_certificate_path, world.site.ca_certificate_path)
    stranger = with_certificate_of(world, other)
    with serving(other) as port, client(stranger, port) as gateway, pytest.raises(Refused, match="does not know"):
        gateway.fetch_manifest()


def test_a_site_cannot_pose_as_the_gateway(world):
    """A hospital's certificate is the federation's too, but it is for clients and names no host."""
    shutil.copy(world.site.tls_key_path, world.federation.server_key_path)
    shutil.copy(world.site.tls_certificate_path, world.federation.server_certificate_path)
    refused(world, Code.GATEWAY)


def test_a_site_certificate_for_servers_would_let_a_site_pose_as_the_gateway(world):
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = world.federation.authority().issue_server(key.public_key(), "localhost", "demo")
    write_secret(world.federation.server_key_path, key_pem(key))
    world.federation.server_certificate_path.write_bytes(certificate_pem(certificate))
    assert fetch(world).exists()


# --- asking for what is not published ---


@pytest.mark.parametrize("name", ["sha256:../../keys/signing.pem", "../keys/ca.key", "", "sha256:" + "0" * 64])
def test_only_published_blobs_can_be_named(world, name):
    with serving(world.federation) as port, client(world.site, port) as gateway, pytest.raises(Refused) as refusal:
        gateway._retry(lambda: list(gateway._stub.FetchBlob(_blob_request(name))), lambda: 0)
    assert refusal.value.code == Code.GATEWAY


def test_a_path_in_place_of_a_digest_reads_the_coordinators_keys_without_the_check(world, monkeypatch):
    import re

    monkeypatch.setattr(gateway_service, "_DIGEST", re.compile(".*"))
    with serving(world.federation) as port, client(world.site, port) as gateway:
        chunks = list(gateway._stub.FetchBlob(_blob_request("../keys/signing.pem")))
    assert b"PRIVATE KEY" in chunks[0].data


def _blob_request(name: str):
    from sspformer.contract import gateway_pb2

    return gateway_pb2.BlobRequest(digest=name)
