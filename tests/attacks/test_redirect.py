"""A coordinator, or what poses as one, that answers 307: the reply must not be sent again to where it points."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supernode.fleet_http_client import FleetHttpClient

from site_client.supernode import PromptFleetClient
from tests.trust import make_federation

BODY = b"a reply of the hospital"


class Sink(ThreadingHTTPServer):
    """Takes what arrives, over plain HTTP."""

    def __init__(self) -> None:
        self.arrived: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Taking)


class _Taking(BaseHTTPRequestHandler):
    server: Sink

    def do_POST(self) -> None:
        self.server.arrived.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Redirecting(ThreadingHTTPServer):
    """Answers every POST with 307, under the federation's own certificate."""

    def __init__(self, target: int, certificate: Path, key: Path) -> None:
        self.location = f"http://127.0.0.1:{target}/"
        self.asked = 0
        super().__init__(("127.0.0.1", 0), _Redirect)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)


class _Redirect(BaseHTTPRequestHandler):
    server: Redirecting

    def do_POST(self) -> None:
        self.server.asked += 1
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(307)
        self.send_header("location", self.server.location)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[tuple[Redirecting, Sink, bytes]]:
    federation = make_federation(tmp_path / "central")
    sink = Sink()
    front = Redirecting(sink.server_port, federation.server_certificate_path, federation.server_key_path)
    for server in (sink, front):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield front, sink, federation.ca_certificate_path.read_bytes()
    finally:
        for server in (front, sink):
            server.shutdown()
            server.server_close()


def push(kind: type[FleetHttpClient], front: Redirecting, ca: bytes) -> None:
    """Send an object as the SuperNode does."""
    client = kind.from_server_address(f"localhost:{front.server_port}", False, ca, [])
    try:
        client.PushObject(PushObjectRequest(object_content=BODY))
    finally:
        client.close()


def test_nothing_follows_a_redirect(stage: tuple[Redirecting, Sink, bytes]) -> None:
    front, sink, ca = stage
    with pytest.raises(httpx.HTTPStatusError, match="307"):
        push(PromptFleetClient, front, ca)
    assert front.asked == 1
    assert sink.arrived == []


def test_mutant_flowers_own_client_sends_the_body_on(stage: tuple[Redirecting, Sink, bytes]) -> None:
    front, sink, ca = stage
    push(FleetHttpClient, front, ca)
    assert len(sink.arrived) == 1
    assert BODY in sink.arrived[0]
