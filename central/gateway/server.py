"""The gateway's process: one gRPC server, mutual TLS always on."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import typer

from central.federation import Federation
from central.gateway.service import AdmittedOnly, GatewayService
from central.registry import SiteRegistry
from sspformer.contract import gateway_pb2_grpc
from sspformer.contract.console import run_app
from sspformer.contract.durable import read_secret
from sspformer.contract.errors import Code, Refused

MAX_MESSAGE_BYTES = 8 << 20
_THREADS = 64
_STOP_S = 2.0
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # sites ping to notice a dead connection
    ("grpc.keepalive_permit_without_calls", 1),
]


def make_server(federation: Federation, port: int | None = None) -> tuple[grpc.Server, int]:
    """Make the server and take its port; the caller starts and stops it.

    Args:
        federation: the coordinator.
        port: another port than the configured one; 0 takes any free one.

    Returns:
        The server and its port.

    Raises:
        Refused: E-STATE when a key is missing or open to others; E-PORT when the port is taken.
    """
    credentials = grpc.ssl_server_credentials(
        [
            (
                read_secret(federation.server_key_path, "the server's key"),
                federation.server_certificate_path.read_bytes(),
            )
        ],
        root_certificates=federation.ca_certificate_path.read_bytes(),
        require_client_auth=True,
    )
    server = grpc.server(
        ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="gateway"),
        interceptors=[AdmittedOnly(SiteRegistry(federation.sites_path))],
        options=_OPTIONS,
        maximum_concurrent_rpcs=_THREADS,
    )
    gateway_pb2_grpc.add_GatewayServicer_to_server(GatewayService(federation), server)
    config = federation.config
    wanted = config.gateway_port if port is None else port
    host = f"[{config.bind}]" if ":" in config.bind else config.bind
    try:
        taken = server.add_secure_port(f"{host}:{wanted}", credentials)
    except RuntimeError:
        raise Refused(
            Code.PORT,
            f"The gateway cannot listen on {config.bind} port {wanted}: it is taken or not this machine's.",
            "Stop what uses it, or change gateway_port in central.yaml.",
        ) from None
    return server, taken


def serve(root: Path) -> None:
    """Serve until SIGTERM or SIGINT. Prints one line when calls are taken.

    Raises:
        Refused: as `make_server`.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    federation = Federation.open(root)
    server, port = make_server(federation)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server.start()
    print(f"gateway ready on {federation.config.bind} port {port}", flush=True)
    stop.wait()
    server.stop(_STOP_S).wait()


def main() -> None:
    """Entry point of `python -m central.gateway STATE`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help="Serve the gateway of the coordinator's folder STATE.")(_command)
    run_app(app)


def _command(state: Path = typer.Argument(metavar="STATE")) -> None:  # noqa: B008 - typer's way
    serve(state)
