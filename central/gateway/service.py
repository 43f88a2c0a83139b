"""What hospitals may ask of the gateway, and the check that stands before every call."""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from cryptography import x509

from central.federation import Federation
from central.registry import Publication, SiteRegistry
from sspformer.contract import gateway_pb2, gateway_pb2_grpc
from sspformer.contract.errors import Code, Refused

CHUNK_BYTES = 1 << 20
STREAMS_PER_SITE = 4  # a stream holds one of the server's threads until the site has read it
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_log = logging.getLogger(__name__)


class GatewayService(gateway_pb2_grpc.GatewayServicer):
    """Hands out the signed manifest and the published files.

    Args:
        federation: the coordinator.
    """

    def __init__(self, federation: Federation) -> None:
        self._publication = Publication(federation)

    def FetchManifest(  # noqa: N802 - the name in the .proto file
        self, request: gateway_pb2.ManifestRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.ManifestReply:
        """Return the sealed manifest."""
        return gateway_pb2.ManifestReply(envelope=self._publication.envelope())

    def FetchBlob(  # noqa: N802
        self, request: gateway_pb2.BlobRequest, context: grpc.ServicerContext
    ) -> Iterator[gateway_pb2.BlobChunk]:
        """Stream one published file from an offset on."""
        if not _DIGEST.fullmatch(request.digest):  # also what keeps a path out of the name
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, Code.DIGEST)
        path = self._publication.blob_path(request.digest)
        if not path.is_file():
            context.abort(grpc.StatusCode.NOT_FOUND, Code.STATE)
        with path.open("rb") as file:
            if request.offset > file.seek(0, 2):
                context.abort(grpc.StatusCode.OUT_OF_RANGE, Code.STATE)
            offset = file.seek(request.offset)
            while data := file.read(CHUNK_BYTES):
                yield gateway_pb2.BlobChunk(offset=offset, data=data)
                offset += len(data)


class AdmittedOnly(grpc.ServerInterceptor):
    """Lets a call through when the peer's certificate is in the register of sites now.

    TLS has already proved that the certificate is the federation's; but a session outlives a certificate and a
    certificate outlives an admission, so each call is checked. Only a code ever goes back: exception text stays here.

    Args:
        registry: the register of admitted sites, read at every call.
    """

    def __init__(self, registry: SiteRegistry) -> None:
        self._registry = registry
        self._streams: Counter[str] = Counter()
        self._counting = threading.Lock()

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """Wrap the handler: call details carry no peer, the handler's context does."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._guard_call(handler.unary_unary), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                self._guard_stream(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        raise TypeError("a kind of call that has no guard")

    def _guard_call(self, handle: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[..., Any]:
        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                self._check(context)
                return handle(request, context)
            except Exception as error:
                _abort(context, error)

        return guarded

    def _guard_stream(self, handle: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[..., Any]:
        def guarded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                with self._stream(self._check(context), context):
                    yield from handle(request, context)
            except Exception as error:
                _abort(context, error)

        return guarded

    @contextmanager
    def _stream(self, site: str, context: grpc.ServicerContext) -> Iterator[None]:
        """Count a site's streams, so that one site cannot hold all threads of the server."""
        with self._counting:
            full = self._streams[site] >= STREAMS_PER_SITE
            if not full:
                self._streams[site] += 1
        if full:
            _log.warning("refused a call: site %s has %d streams open", site, STREAMS_PER_SITE)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, Code.GATEWAY)
        try:
            yield
        finally:  # also when the peer is gone: gRPC then closes the generator
            with self._counting:
                self._streams[site] -= 1

    def _check(self, context: grpc.ServicerContext) -> str:
        """Return the name of the site that calls; end the call of anyone else."""
        serial = peer_serial(context)
        site = self._registry.find(serial) if serial is not None else None
        if site is None:
            _log.warning("refused a call: certificate %x is not admitted", serial or 0)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, Code.GATEWAY)
            raise AssertionError("abort does not return")
        return site.name


def peer_serial(context: grpc.ServicerContext) -> int | None:
    """Return the serial number of the certificate with which the peer of a call proved itself."""
    pems = context.auth_context().get("x509_pem_cert", [])
    return x509.load_pem_x509_certificate(pems[0]).serial_number if pems else None


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    """End a call with a status and a code. `context.abort` itself raises a bare Exception, which must pass."""
    if type(error) is Exception:
        raise error
    if isinstance(error, Refused):
        _log.warning("refused a call: %s", error)
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.code)
    _log.error("a call failed", exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, Code.INTERNAL)
