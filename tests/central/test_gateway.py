"""The gateway as a process and as a service; attacks are in tests/attacks/test_download.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import grpc
import pytest

from central.gateway import service
from central.gateway.server import make_server
from central.gateway.service import CHUNK_BYTES, STREAMS_PER_SITE, GatewayService
from central.registry import Publication
from sspformer.contract import gateway_pb2
from sspformer.contract.errors import Code, Refused
from tests.conftest import ROOT
from tests.trust import MIB, client, join, make_federation, publish, serving


@pytest.fixture
def federation(tmp_path):
    return make_federation(tmp_path / "federation")


def chunks_of(gateway, digest: str, offset: int = 0) -> list[gateway_pb2.BlobChunk]:
    return list(gateway._stub.FetchBlob(gateway_pb2.BlobRequest(digest=digest, offset=offset)))


def test_a_blob_comes_in_small_chunks_from_any_offset(federation, tmp_path):
    publish(federation, tmp_path / "models", size=3 * MIB)
    site = join(federation, tmp_path / "site")
    encoder = Publication(federation).manifest().encoder
    data = Publication(federation).blob_path(encoder.digest).read_bytes()
    with serving(federation) as port, client(site, port) as gateway:
        for offset in (0, 1, MIB, len(data) - 1, len(data)):
            chunks = chunks_of(gateway, encoder.digest, offset)
            assert b"".join(chunk.data for chunk in chunks) == data[offset:]
            assert [chunk.offset for chunk in chunks] == list(range(offset, len(data), CHUNK_BYTES))
            assert all(len(chunk.data) <= CHUNK_BYTES for chunk in chunks)
        with pytest.raises(grpc.RpcError) as error:
            chunks_of(gateway, encoder.digest, len(data) + 1)
        assert error.value.code() == grpc.StatusCode.OUT_OF_RANGE


def test_a_defect_in_the_service_sends_a_code_and_no_text(federation, tmp_path, monkeypatch, caplog):
    site = join(federation, tmp_path / "site")

    def fail(*_):
        raise RuntimeError("/srv/secret/path")

    monkeypatch.setattr(GatewayService, "FetchManifest", fail)
    with serving(federation) as port, client(site, port) as gateway, pytest.raises(grpc.RpcError) as error:
        gateway._stub.FetchManifest(gateway_pb2.ManifestRequest())
    assert error.value.code() == grpc.StatusCode.INTERNAL
    assert error.value.details() == "E-INTERNAL"
    assert "/srv/secret/path" in caplog.text  # it stays in the coordinator's own log


def test_plain_text_is_not_served(federation):
    with serving(federation) as port, grpc.insecure_channel(f"localhost:{port}") as channel:
        call = channel.unary_unary("/sspformer.gateway.v1.Gateway/FetchManifest")
        with pytest.raises(grpc.RpcError) as error:
            call(b"", timeout=2)
    assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_too_large_a_message_is_refused(federation, tmp_path):
    site = join(federation, tmp_path / "site")
    with serving(federation) as port, client(site, port) as gateway:
        call = gateway._channel.unary_unary("/sspformer.gateway.v1.Gateway/FetchManifest")
        with pytest.raises(grpc.RpcError) as error:
            call(bytes(9 * MIB))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_taken_port_is_one_refusal(federation):
    with serving(federation) as port, pytest.raises(Refused) as refusal:
        make_server(federation, port)
    assert refusal.value.code == Code.PORT
    assert str(port) in refusal.value.what


def test_a_server_key_open_to_others_is_refused(federation):
    federation.server_key_path.chmod(0o644)
    with pytest.raises(Refused, match="other users"):
        make_server(federation, 0)


def held_streams(gateway, digest: str, count: int) -> tuple[list[grpc.Call], list[tuple[grpc.StatusCode, str]]]:
    """Open streams and read one chunk of each and no more; give those that are served, and the errors of the others."""
    calls = [gateway._stub.FetchBlob(gateway_pb2.BlobRequest(digest=digest)) for _ in range(count)]
    served, errors = [], []
    for call in calls:
        try:
            next(call)
            served.append(call)
        except grpc.RpcError as error:
            errors.append((error.code(), error.details()))
    return served, errors


@pytest.fixture
def two_sites(federation, tmp_path):
    publish(federation, tmp_path / "models", size=16 * MIB)
    sites = join(federation, tmp_path / "alpha", "alpha"), join(federation, tmp_path / "bravo", "bravo")
    return (*sites, Publication(federation).manifest().encoder.digest)


def test_one_site_cannot_hold_all_streams(federation, two_sites):
    alpha, bravo, digest = two_sites
    with serving(federation) as port, client(alpha, port) as greedy, client(bravo, port) as other:
        held, errors = held_streams(greedy, digest, 40)
        assert len(held) == STREAMS_PER_SITE
        assert set(errors) == {(grpc.StatusCode.RESOURCE_EXHAUSTED, "E-GATEWAY")}
        assert other.fetch_manifest()[0].sequence == 1
        assert len(held_streams(other, digest, 1)[0]) == 1
        for call in held:
            call.cancel()
        deadline = time.monotonic() + 10
        while not held_streams(greedy, digest, 1)[0]:  # what it let go of is its own again
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_mutant_without_the_bound_lets_one_site_hold_them_all(federation, two_sites, monkeypatch):
    alpha, bravo, digest = two_sites
    monkeypatch.setattr(service, "STREAMS_PER_SITE", 1000)
    with serving(federation) as port, client(alpha, port) as greedy, client(bravo, port) as other:
        held = [greedy._stub.FetchBlob(gateway_pb2.BlobRequest(digest=digest)) for _ in range(64)]
        for call in held:
            next(call)
        with pytest.raises(grpc.RpcError) as error:
            other._stub.FetchManifest(gateway_pb2.ManifestRequest(), timeout=2)
        assert error.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
        for call in held:
            call.cancel()


def start(federation) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "central.gateway", str(federation.root)]
    # Flower, which other tests of this process import, makes gRPC talkative for every process below it.
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_process_serves_and_stops_on_sigterm(federation, tmp_path):
    publish(federation, tmp_path / "models", size=MIB)
    site = join(federation, tmp_path / "site")
    with start(federation) as process:
        try:
            line = process.stdout.readline()
            assert line == f"gateway ready on 127.0.0.1 port {federation.config.gateway_port}\n"
            with client(site) as gateway:
                assert gateway.fetch_manifest()[0].sequence == 1
            with start(federation) as second:  # the same port again
                _out, err = second.communicate(timeout=30)
                assert second.returncode == 2
                assert err.startswith("E-PORT: ")
                assert err.count("\n") == 1
        finally:
            process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - began < 10


def test_the_process_refuses_a_folder_that_is_none(tmp_path):
    command = [sys.executable, "-m", "central.gateway", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("E-CONFIG: ")
    assert done.stderr.count("\n") == 1


def test_the_gateway_killed_in_the_middle_of_a_download(federation, tmp_path):
    publish(federation, tmp_path / "models", size=8 * MIB)
    site = join(federation, tmp_path / "site")
    encoder = Publication(federation).manifest().encoder
    processes = [start(federation)]
    processes[0].stdout.readline()
    killed_at = []

    def kill_once(_role: str, done: int, _total: int) -> None:
        if not killed_at and done >= 3 * MIB:
            killed_at.append(done)
            processes[0].kill()
            processes[0].wait()
            processes.append(start(federation))
            processes[1].stdout.readline()

    try:
        with client(site) as gateway:
            path = gateway.fetch_blob(encoder, kill_once)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert killed_at
    assert path.read_bytes() == Publication(federation).blob_path(encoder.digest).read_bytes()
