"""Fetching what the coordinator published: mutual TLS, resumed where a cut left off, used only after it is verified.

A download grows in `store/sha256-<hex>.part`. It gets its real name only when the whole file has the digest that the
signed manifest names and is a plain safetensors file; nothing ever reads a `.part` but the download that continues it.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is imported: a refusal is one line, ours

import grpc
from cryptography import x509

from site_client.folder import SiteFolder
from sspformer.contract import gateway_pb2, gateway_pb2_grpc
from sspformer.contract.artifact import read_header
from sspformer.contract.canonical import digest_file
from sspformer.contract.durable import read_secret, sync_folder
from sspformer.contract.errors import Code, Refused
from sspformer.contract.manifest import Artifact, Manifest, verify_manifest

MAX_MESSAGE_BYTES = 8 << 20
_FLUSH_BYTES = 16 << 20  # how much of a download a power cut may cost
_DISK_RESERVE_BYTES = 64 << 20
_PASSING = {  # what a cut, a restart or a busy coordinator looks like; everything else is an answer
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
}
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 1 << 20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.keepalive_time_ms", 20_000),  # notices a connection that died without a word
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # the destination is the configured one, whatever the environment says
]
# How gRPC words a server certificate that does not hold. The connection is refused either way; this makes it clear.
_IMPOSTOR = re.compile("CERTIFICATE_VERIFY_FAILED|[Hh]ostname [Vv]erification")
Progress = Callable[[str, int, int], None]  # role, bytes there, bytes in all
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Backoff:
    """How long to keep trying. An attempt that brought bytes does not count."""

    attempts: int = 8
    first_s: float = 0.5
    longest_s: float = 30.0

    def pause_s(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row; spread, so that sites do not come back all at once."""
        pause = min(self.longest_s, self.first_s * 2.0 ** (failures - 1))
        return pause * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


class GatewayClient:
    """A site's connection to the coordinator's gateway. Use as a context manager.

    Args:
        folder: the site's folder, after `site-client accept`.
        backoff: how long to keep trying.
        call_timeout_s: longest wait for a small answer.

    Raises:
        Refused: E-CONFIG or E-STATE when the site has not joined, or its certificate has run out.
    """

    def __init__(self, folder: SiteFolder, backoff: Backoff | None = None, call_timeout_s: float = 30.0) -> None:
        self._folder = folder
        self._backoff = backoff or Backoff()
        self._call_timeout_s = call_timeout_s
        coordinator = folder.coordinator()
        host = f"[{coordinator.host}]" if ":" in coordinator.host else coordinator.host
        self._target = f"{host}:{coordinator.gateway_port}"
        self._channel = grpc.secure_channel(self._target, _credentials(folder), options=_OPTIONS)
        self._stub = gateway_pb2_grpc.GatewayStub(self._channel)

    def __enter__(self) -> GatewayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def fetch_manifest(self) -> tuple[Manifest, bytes]:
        """Fetch and verify the manifest; it must not be older than the one this site already holds.

        Returns:
            The manifest, and its sealed bytes.

        Raises:
            Refused: E-SIGNATURE, E-FORMAT, or E-GATEWAY when the coordinator does not answer.
        """

        def ask() -> bytes:
            reply = self._stub.FetchManifest(gateway_pb2.ManifestRequest(), timeout=self._call_timeout_s)
            return bytes(reply.envelope)

        envelope = self._retry(ask, lambda: 0)
        manifest = verify_manifest(envelope, self._folder.coordinator_key())
        if manifest.federation != self._folder.coordinator().federation:
            raise Refused(
                Code.SIGNATURE,
                f"The manifest is of federation {manifest.federation}, which this site has not joined.",
                "Ask the coordinator.",
            )
        _check_not_older(manifest, self._folder)
        return manifest, envelope

    def fetch_blob(self, artifact: Artifact, progress: Progress | None = None) -> Path:
        """Download one artifact, or continue; return where the verified file lies.

        Raises:
            Refused: E-DIGEST when the bytes are not the signed ones, E-FORMAT when they are not safetensors (the bad
                download is removed), E-GATEWAY when the coordinator does not answer, E-STATE when the disk is full or
                another fetch is running.
        """
        final = self._folder.artifact_path(artifact)
        with _only_one(self._folder.store):
            if final.exists():
                if digest_file(final) == artifact.digest:
                    return final
                final.unlink()  # damaged on disk since it was verified
            part = final.with_name(final.name + ".part")
            _check_space(part, artifact)
            try:
                self._retry(lambda: self._continue(artifact, part, progress), lambda: _size(part))
                _verify(part, artifact)
            except Refused as refusal:
                if refusal.code in (Code.DIGEST, Code.FORMAT):
                    part.unlink(missing_ok=True)
                raise
            os.replace(part, final)
            sync_folder(final.parent)
        return final

    def _continue(self, artifact: Artifact, part: Path, progress: Progress | None) -> None:
        """Append what is still missing, in one call."""
        with part.open("ab") as file:
            size = file.tell()
            if size > artifact.bytes:
                raise _too_long(artifact)
            if size == artifact.bytes:
                return
            call = self._stub.FetchBlob(gateway_pb2.BlobRequest(digest=artifact.digest, offset=size))
            try:
                self._append(call, file, artifact, progress)
            finally:
                call.cancel()
                file.flush()
                os.fsync(file.fileno())

    def _append(
        self, chunks: Iterator[gateway_pb2.BlobChunk], file: BinaryIO, artifact: Artifact, progress: Progress | None
    ) -> None:
        size = flushed = file.tell()
        for chunk in chunks:
            if chunk.offset != size or size + len(chunk.data) > artifact.bytes:
                raise _too_long(artifact)
            file.write(chunk.data)
            size += len(chunk.data)
            if size - flushed >= _FLUSH_BYTES:
                file.flush()
                os.fsync(file.fileno())
                flushed = size
            if progress:
                progress(artifact.role, size, artifact.bytes)
        if size < artifact.bytes:
            raise _EndedEarly

    def _retry(self, attempt: Callable[[], _Result], position: Callable[[], int]) -> _Result:
        """Call until it works, it is refused, or it failed too often without getting any further."""
        failures, reached = 0, position()
        while True:
            try:
                return attempt()
            except (grpc.RpcError, _EndedEarly) as error:
                status = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE
                if status not in _PASSING:
                    raise self._answer(status) from None
                if isinstance(error, grpc.RpcError) and _IMPOSTOR.search(error.details() or ""):
                    raise self._impostor() from None
                failures = 1 if position() > reached else failures + 1
                reached = position()
                if failures >= self._backoff.attempts:
                    raise Refused(
                        Code.GATEWAY,
                        f"The coordinator at {self._target} does not answer ({status.name.lower()}, "
                        f"{failures} attempts).",
                        "Check the network and ask whether the coordinator is running; then run the same command "
                        "again: it continues where it stopped.",
                    ) from None
                if failures == 1:
                    print(f"The coordinator at {self._target} does not answer; trying again ...", file=sys.stderr)
                time.sleep(self._backoff.pause_s(failures))
            except OSError as error:
                raise Refused(
                    Code.STATE,
                    f"The download cannot be written to {self._folder.store} ({error.strerror}).",
                    "Check the disk; then run the same command again: it continues where it stopped.",
                ) from None

    def _impostor(self) -> Refused:
        return Refused(
            Code.GATEWAY,
            f"What answers at {self._target} has no certificate of this federation for that name.",
            "Ask IT whether TLS is intercepted on the way, and the coordinator whether the address is right.",
        )

    def _answer(self, status: grpc.StatusCode) -> Refused:
        if status in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
            return Refused(
                Code.GATEWAY,
                f"The coordinator at {self._target} does not know this site's certificate.",
                "Ask the coordinator whether this site is admitted.",
            )
        return Refused(
            Code.GATEWAY,
            f"The coordinator at {self._target} refused the call ({status.name.lower()}).",
            "Ask the coordinator whether an encoder is published, and look into its log.",
        )


class _EndedEarly(Exception):
    """The stream ended in order, but before the last byte."""


def _credentials(folder: SiteFolder) -> grpc.ChannelCredentials:
    """Read the TLS files. A certificate that ran out looks like a dead gateway on the wire, so it is checked here."""
    key = read_secret(folder.tls_key_path, "the TLS key")
    try:
        certificate = folder.tls_certificate_path.read_bytes()
        authority = folder.ca_certificate_path.read_bytes()
        expiry = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
        x509.load_pem_x509_certificate(authority)
    except (OSError, ValueError):
        raise Refused(
            Code.STATE,
            f"The certificates in {folder.keys} are missing or damaged.",
            "Run: site-client accept SITE ADMISSION.json --fingerprint HEX",
        ) from None
    if datetime.datetime.now(datetime.UTC) >= expiry:
        raise Refused(
            Code.STATE,
            f"The certificate {folder.tls_certificate_path} ran out on {expiry:%Y-%m-%d}.",
            "Ask the coordinator for a new admission.",
        )
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _check_not_older(manifest: Manifest, folder: SiteFolder) -> None:
    """An old manifest is still signed: only its number says that it was replaced."""
    path = folder.manifest_path
    held = verify_manifest(path.read_bytes(), folder.coordinator_key()).sequence if path.exists() else 0
    if manifest.sequence < held:
        raise Refused(
            Code.SIGNATURE,
            f"The coordinator offers manifest {manifest.sequence}, older than {held}, which this site holds.",
            "Ask the coordinator whether an old backup was restored there.",
        )


def _verify(part: Path, artifact: Artifact) -> None:
    """Read the file back whole: what is checked is what is on disk."""
    if digest_file(part) != artifact.digest:
        raise Refused(
            Code.DIGEST,
            f"The downloaded {artifact.role} is not the signed one: its digest differs from {artifact.digest[:19]}…",
            "Run the same command again; if it fails again, tell the coordinator.",
        )
    read_header(part, artifact.file_name)


def _too_long(artifact: Artifact) -> Refused:
    return Refused(
        Code.DIGEST,
        f"The download of the {artifact.role} is longer than the signed {artifact.bytes} bytes, or out of order.",
        "Run the same command again; if it fails again, tell the coordinator.",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_space(part: Path, artifact: Artifact) -> None:
    needed = artifact.bytes - _size(part) + _DISK_RESERVE_BYTES
    free = shutil.disk_usage(part.parent).free
    if free < needed:
        raise Refused(
            Code.STATE,
            f"{part.parent} has {free >> 20} MiB free; the {artifact.role} needs {needed >> 20} MiB.",
            "Free some space; then run the same command again.",
        )


@contextmanager
def _only_one(store: Path) -> Iterator[None]:
    """Two fetches into one `.part` would spoil it."""
    with (store / ".fetch.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                Code.STATE, f"Another fetch is writing to {store}.", "Wait for it to end, then run the command again."
            ) from None
        yield
