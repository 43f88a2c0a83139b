"""A small real federation for tests: a coordinator's folder, joined sites, the real gateway, and a hostile network."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from central.admission import admit, admit_file
from central.federation import Federation
from central.federation import create as create_federation
from central.gateway.server import make_server
from central.registry import Publication
from site_client.folder import SiteFolder
from site_client.gateway_client import Backoff, GatewayClient
from site_client.join import accept
from site_client.join import create as create_site
from sspformer.contract.envelope import read_unverified
from sspformer.contract.errors import Refused
from sspformer.contract.joining import Admission
from sspformer.contract.keys import fingerprint, parse_public

QUICK = Backoff(attempts=3, first_s=0.01, longest_s=0.02)
PATIENT = Backoff(attempts=50, first_s=0.01, longest_s=0.05)
MIB = 1 << 20


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tensors_file(path: Path, size: int, metadata: dict[str, str] | None = None, seed: int = 0) -> Path:
    """Write a safetensors file with about `size` bytes of data."""
    values = np.random.default_rng(seed).standard_normal(size // 4, dtype=np.float32)
    path.write_bytes(save({"layer.weight": values}, metadata=metadata))
    return path


def make_federation(root: Path, name: str = "demo") -> Federation:
    """Make a coordinator's folder."""
    gateway, superlink = free_port(), free_port()
    create_federation(root, name=name, host="localhost", gateway_port=gateway, superlink_port=superlink)
    return Federation.open(root)


def publish(federation: Federation, folder: Path, size: int = 5 * MIB) -> None:
    """Publish an encoder of about `size` bytes and a small head."""
    folder.mkdir(exist_ok=True)
    encoder = tensors_file(folder / "encoder.safetensors", size)
    head = tensors_file(folder / "head.safetensors", 4096, seed=1)
    Publication(federation).publish(encoder=encoder, head=head)


def print_in(envelope: bytes) -> str:
    """Return the fingerprint of the key that a request names, as its site reads it out."""
    try:
        return fingerprint(parse_public(read_unverified(envelope, "request")["signing_public_key"]))
    except (Refused, KeyError, TypeError):
        return "00"


def admit_request(federation: Federation, envelope: bytes) -> tuple[Admission, bytes]:
    """Admit a request whose site read its fingerprint out."""
    return admit(federation, envelope, print_in(envelope))


def admit_request_file(root: Path, request: Path, output: Path | None = None) -> list[str]:
    """Admit a request in a file whose site read its fingerprint out."""
    spoken = print_in(request.read_bytes()) if request.exists() else "00"
    return admit_file(root, request, output, fingerprint=spoken)


def join(federation: Federation, root: Path, name: str = "alpha") -> SiteFolder:
    """Make a site and let it join, by the functions that the commands call."""
    data = root.parent / "bids"
    data.mkdir(exist_ok=True)
    create_site(root, name=name, data=data, device="cpu")
    admission = root / "admission.json"
    admit_request_file(federation.root, root / "request.json", admission)
    accept(root, admission, fingerprint=fingerprint(federation.signing_key().public_key()))
    return SiteFolder.open(root)


@contextmanager
def serving(federation: Federation, port: int | None = None) -> Iterator[int]:
    """Run the real gateway; gives its port."""
    server, taken = make_server(federation, port)
    server.start()
    try:
        yield taken
    finally:
        server.stop(0).wait()


def through(folder: SiteFolder, port: int) -> SiteFolder:
    """Return the site's folder with the coordinator at another port."""
    coordinator = folder.coordinator().model_copy(update={"gateway_port": port})
    return replace(folder, config=folder.config.model_copy(update={"coordinator": coordinator}))


def client(folder: SiteFolder, port: int | None = None, backoff: Backoff = QUICK) -> GatewayClient:
    """Return a client that does not wait long."""
    return GatewayClient(through(folder, port) if port else folder, backoff, call_timeout_s=5.0)


class CuttingProxy:
    """A TCP proxy that resets each connection after so many bytes to the client; TLS passes through it untouched.

    Args:
        target: port on loopback to forward to.
        cuts: for each connection, after how many bytes it is cut; connections beyond the list are left alone.
    """

    def __init__(self, target: int, cuts: list[int]) -> None:
        self._target, self._cuts = target, list(cuts)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cut_count = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            limit = self._cuts.pop(0) if self._cuts else None
            threading.Thread(target=self._pump, args=(near, far, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, limit), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
                passed += len(data)
                if limit is not None and passed >= limit:
                    self.cut_count += 1
                    for end in (source, sink):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
