"""Flower's SuperNode, started with a Fleet client that suits a hospital.

The program is Flower's own `flower-supernode`. Only its client of the Fleet API is exchanged for a subclass that

* waits for a message by looking every 0.25 s, where the SuperNode would sleep 3 s after every empty look;
* waits for tensors that are still on their way, where it would sleep 1 s;
* reports a run time of zero, because the run time of a private round tells how many patients were drawn;
* takes its node back at once after a crash, where the SuperLink would call it "still online" for a minute;
* follows no redirect: Flower's would send a whole reply again to whatever address an answer names, over plain HTTP too.

    python -m site_client.supernode NODE_FILE --superlink HOST:PORT ...   (all further arguments are flower-supernode's)
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from sspformer.contract.durable import write_file
from sspformer.contract.supervise import die_with_parent

POLL_S = 0.25
IDLE_POLL_S = 1.0  # after IDLE_AFTER_S without a message nobody is in the middle of a run
IDLE_AFTER_S = 60.0
OBJECT_POLL_S = 0.05  # first pause; it grows to OBJECT_SLOWEST_S
OBJECT_SLOWEST_S = 0.5
OBJECT_WAIT_S = 20.0


class PromptFleetClient(FleetHttpClient):
    """Flower's client of the Fleet API with the pauses of a hospital."""

    node_file: Path
    _last_message = 0.0
    # Flower pulls with many threads. Only one of them asks on, or a busy SuperLink gets nothing else done.
    _waiting = threading.Lock()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._client.follow_redirects = False  # a redirect then is an HTTP error like any other

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:  # noqa: N802
        """Activate the node; when it still counts as online since a crash, sign it off first."""
        try:
            response = super().ActivateNode(request)
        except httpx.HTTPStatusError:
            if not self.node_file.exists():
                raise
            self.DeactivateNode(DeactivateNodeRequest(node_id=int(self.node_file.read_text())))
            response = super().ActivateNode(request)
        write_file(self.node_file, str(response.node_id).encode())
        return response

    def PullMessages(self, request: PullMessagesRequest) -> PullMessagesResponse:  # noqa: N802
        """Look until there is a message."""
        while True:
            response = super().PullMessages(request)
            now = time.monotonic()
            if response.messages_list:
                self._last_message = now
                return response
            time.sleep(POLL_S if now - self._last_message < IDLE_AFTER_S else IDLE_POLL_S)

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        """Look until an announced object has arrived."""
        response = super().PullObject(request)
        if not response.object_found or response.object_available:
            return response
        deadline, pause = time.monotonic() + OBJECT_WAIT_S, OBJECT_POLL_S
        with self._waiting:
            while response.object_found and not response.object_available and time.monotonic() < deadline:
                time.sleep(pause)
                pause = min(OBJECT_SLOWEST_S, 1.5 * pause)
                response = super().PullObject(request)
        return response

    def PushMessages(self, request: PushMessagesRequest) -> PushMessagesResponse:  # noqa: N802
        """Announce a reply without its run time."""
        request.clientapp_runtime_list[:] = [0.0] * len(request.messages_list)
        return super().PushMessages(request)


def main() -> None:
    """Start the SuperNode."""
    die_with_parent()
    PromptFleetClient.node_file = Path(sys.argv.pop(1))
    fleet_http_connection.FleetHttpClient = PromptFleetClient
    flower_supernode()
    # Flower comes back here when its loop has died of an error, and its runtime API would live on as if nothing were.
    os._exit(1)


if __name__ == "__main__":
    main()
