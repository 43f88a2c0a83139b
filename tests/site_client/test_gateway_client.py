"""Downloading over the real gateway and real TLS: cuts, restarts, crashes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from central.federation import Federation
from central.gateway.service import GatewayService
from central.registry import Publication
from site_client.fetch import fetch_published
from site_client.folder import SiteFolder
from site_client.gateway_client import Backoff
from sspformer.contract.canonical import digest_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.manifest import Artifact
from tests.trust import MIB, PATIENT, CuttingProxy, client, free_port, join, make_federation, publish, serving, through


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("central")
    federation = make_federation(folder / "federation")
    # Much more than sockets and flow control hold: a cut or a stop then really falls into the download.
    publish(federation, folder / "models", 32 * MIB)
    return federation


@pytest.fixture
def site(federation: Federation, tmp_path: Path) -> SiteFolder:
    return join(federation, tmp_path / "site", name=f"site-{os.urandom(4).hex()}")


@pytest.fixture
def offsets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets that the gateway was asked for."""
    seen: list[int] = []
    original = GatewayService.FetchBlob

    def spy(self, request, context):
        seen.append(request.offset)
        return original(self, request, context)

    monkeypatch.setattr(GatewayService, "FetchBlob", spy)
    return seen


def encoder_of(federation: Federation) -> Artifact:
    return Publication(federation).manifest().encoder


def test_fetch_stores_both_artifacts_and_the_manifest(federation, site):
    with serving(federation) as port:
        through(site, port).config.save(site.config_path)
        lines = fetch_published(site.root)
    manifest = Publication(federation).manifest()
    assert {digest_file(site.artifact_path(artifact)) for artifact in manifest.artifacts} == {
        manifest.encoder.digest,
        manifest.head.digest,
    }
    assert site.manifest_path.read_bytes() == federation.manifest_path.read_bytes()
    assert "signature verified" in lines[0]


def test_three_cuts_resume_at_the_offset(federation, site, offsets):
    cuts = [8 * MIB, 6 * MIB, 9 * MIB]
    with serving(federation) as port, CuttingProxy(port, cuts) as proxy, client(site, proxy.port, PATIENT) as gateway:
        path = gateway.fetch_blob(encoder_of(federation))
        assert proxy.cut_count == 3
    assert digest_file(path) == encoder_of(federation).digest
    assert offsets[0] == 0
    assert len(offsets) == 4
    assert offsets == sorted(offsets)
    # What arrived before the cuts was kept, not fetched again. (A reset throws away what no program has read yet, so
    # one cut alone may leave nothing behind.)
    assert offsets[3] >= MIB
    assert not path.with_name(path.name + ".part").exists()


def test_the_gateway_stopped_and_started_again(federation, site, offsets):
    port = free_port()
    artifact = encoder_of(federation)
    with client(site, port, PATIENT) as gateway:
        first = serving(federation, port)
        second = serving(federation, port)
        first.__enter__()
        stopped = False

        def stop_once(_role: str, done: int, _total: int) -> None:
            nonlocal stopped
            if not stopped and done >= 2 * MIB:
                stopped = True
                first.__exit__(None, None, None)
                second.__enter__()

        path = gateway.fetch_blob(artifact, stop_once)
        second.__exit__(None, None, None)
    assert stopped
    assert digest_file(path) == artifact.digest
    assert offsets[0] == 0
    assert offsets[-1] >= 2 * MIB


def test_a_client_that_died_continues(federation, site, offsets):
    def die(_role: str, done: int, _total: int) -> None:
        if done >= 2 * MIB:
            raise KeyboardInterrupt

    artifact = encoder_of(federation)
    with serving(federation) as port:
        with client(site, port) as gateway, pytest.raises(KeyboardInterrupt):
            gateway.fetch_blob(artifact, die)
        assert not site.artifact_path(artifact).exists()
        with client(site, port) as gateway:
            path = gateway.fetch_blob(artifact)
    assert offsets == [0, 2 * MIB]
    assert digest_file(path) == artifact.digest


def test_a_part_spoilt_by_a_power_cut_is_dropped_then_fetched_whole(federation, site):
    artifact = encoder_of(federation)
    part = site.artifact_path(artifact).with_name(artifact.blob_name + ".part")
    part.write_bytes(bytes(3 * MIB))
    with serving(federation) as port, client(site, port) as gateway:
        with pytest.raises(Refused) as refusal:
            gateway.fetch_blob(artifact)
        assert refusal.value.code == Code.DIGEST
        assert not part.exists()
        assert digest_file(gateway.fetch_blob(artifact)) == artifact.digest


def test_a_part_longer_than_the_artifact_is_dropped(federation, site):
    artifact = encoder_of(federation)
    part = site.artifact_path(artifact).with_name(artifact.blob_name + ".part")
    part.write_bytes(bytes(artifact.bytes + 1))
    with serving(federation) as port, client(site, port) as gateway:
        with pytest.raises(Refused, match="longer"):
            gateway.fetch_blob(artifact)
        assert not part.exists()


def test_what_is_there_is_checked_again_and_not_fetched_again(federation, site, offsets):
    artifact = encoder_of(federation)
    with serving(federation) as port, client(site, port) as gateway:
        path = gateway.fetch_blob(artifact)
        gateway.fetch_blob(artifact)
        assert offsets == [0]
        path.write_bytes(b"spoilt")
        gateway.fetch_blob(artifact)
    assert offsets == [0, 0]
    assert digest_file(path) == artifact.digest


def test_no_gateway_is_one_refusal(federation, site):
    with client(site, free_port()) as gateway, pytest.raises(Refused) as refusal:
        gateway.fetch_manifest()
    assert refusal.value.code == Code.GATEWAY
    assert "3 attempts" in str(refusal.value)


def test_nothing_published_is_one_refusal(tmp_path):
    federation = make_federation(tmp_path / "federation")
    site = join(federation, tmp_path / "site")
    with serving(federation) as port, client(site, port) as gateway, pytest.raises(Refused) as refusal:
        gateway.fetch_manifest()
    assert refusal.value.code == Code.GATEWAY
    assert "published" in refusal.value.next_step


def test_two_fetches_do_not_share_a_part(federation, site):
    artifact = encoder_of(federation)
    with serving(federation) as port, client(site, port) as one, client(site, port) as other:
        codes = []

        def try_other(*_: object) -> None:
            if not codes:
                with pytest.raises(Refused) as refusal:
                    other.fetch_blob(artifact)
                codes.append(refusal.value.code)

        one.fetch_blob(artifact, try_other)
    assert codes == [Code.STATE]


def test_a_site_that_has_not_joined_is_told_how(tmp_path):
    from site_client.join import create

    (tmp_path / "bids").mkdir()
    create(tmp_path / "site", name="alpha", data=tmp_path / "bids", device="cpu")
    with pytest.raises(Refused, match="not joined"):
        fetch_published(tmp_path / "site")


def test_a_full_disk_is_said_before_the_download(federation, site, monkeypatch, offsets):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 0))
    with serving(federation) as port, client(site, port) as gateway, pytest.raises(Refused, match="free"):
        gateway.fetch_blob(encoder_of(federation))
    assert offsets == []


def test_backoff_grows_and_is_bounded():
    backoff = Backoff(attempts=8, first_s=1.0, longest_s=4.0)
    assert 0.5 <= backoff.pause_s(1) <= 1.0
    assert 1.0 <= backoff.pause_s(2) <= 2.0
    assert all(2.0 <= backoff.pause_s(n) <= 4.0 for n in range(3, 20))
