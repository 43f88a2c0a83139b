"""The locked runner: what stands in for Flower's SuperExec at a hospital.

SuperExec would unpack the app bundle that the coordinator ships, and run it. This one takes tasks of the SuperNode's
runtime API too, but calls the client app of the site's own installation; the bundle's bytes are never looked at. The
process lives as long as the site, so torch, the encoder and the features stay warm between rounds.

    python -m site_client.worker SITE --runtime-api 127.0.0.1:PORT
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from site_client.app import FinishFunction, RoundFunction, SiteLike, client_app, refusal_of
from site_client.logs import Event, event, open_logs
from site_client.start import READY_FILE
from sspformer.contract.durable import read_secret, write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.supervise import die_with_parent

POLL_S = 0.1  # pause between looks for a task, on loopback
IDLE_POLL_S = 0.5  # after IDLE_AFTER_S without a task nobody is in the middle of a run
IDLE_AFTER_S = 60.0
AWAY_S = 1.0  # pause after a SuperNode did not answer, or answered nonsense
BACKOFF_S = 0.05  # a task is visible a moment before its tensors are; Flower's own first pause is 1 s
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_LOG = logging.getLogger("site_client")


class Runner:
    """Takes client-app tasks one after another.

    Args:
        address: host and port of the SuperNode's runtime API, on loopback.
        secret: what the SuperNode and this process share.
        app: the installed client app.
    """

    def __init__(self, address: str, secret: bytes, app: ClientApp) -> None:
        self._address = address
        self._app = app
        self._client = self._connect(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE}))

    def serve(self) -> None:
        """Take tasks for ever. A SuperNode that is away is waited for."""
        last_task = float("-inf")
        while True:
            if self.take_one():
                last_task = time.monotonic()
            else:
                time.sleep(POLL_S if time.monotonic() - last_task < IDLE_AFTER_S else IDLE_POLL_S)

    def take_one(self) -> bool:
        """Take and finish one task if there is one; say whether there was."""
        try:
            # Only client apps: an agent app or a connector would be code of the coordinator's choice.
            claim = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except httpx.HTTPError:
            time.sleep(AWAY_S)
            return False
        except Exception:
            _LOG.exception("an answer of the SuperNode cannot be read")
            event(Code.FORMAT)
            time.sleep(AWAY_S)
            return False
        if not claim.HasField("task") or not claim.token:
            return False
        client = self._connect(RuntimeTokenHttpInterceptor(claim.token))
        try:
            self._work(client)
        except httpx.HTTPError as error:
            # The SuperNode went away in between. The reply is on disk; the coordinator asks again.
            _LOG.warning("the SuperNode did not take part to the end (%s)", type(error).__name__)
            event(Event.NODE_AWAY)
        except Exception:
            # A message that Flower itself cannot unpack. It has been answered as failed; the next one may be sound.
            _LOG.exception("a task cannot be worked on")
            event(Code.FORMAT)
        finally:
            client.close()
        return True

    def _work(self, client: RuntimeHttpClient) -> None:
        heartbeat = HeartbeatSender(_heartbeat(client))
        heartbeat.start()
        context: Context | None = None
        status, details = SubStatus.FAILED, Code.INTERNAL.value
        try:
            message, context = _pull(client)
            push_message(client, self._answer(message, context), context)
            status, details = SubStatus.COMPLETED, ""
        finally:
            try:
                push_task_output(client, context, status, details)
            finally:
                if heartbeat.is_running:
                    heartbeat.stop()

    def _answer(self, message: Message, context: Context) -> Message:
        try:
            return self._app(message=message, context=context)
        except Exception:
            # A message of a kind that our coordinator never sends. Without an answer the SuperNode would wait for ever.
            _LOG.exception("a message could not be answered")
            event(Code.FORMAT)
            return refusal_of(message, Code.FORMAT)

    def _connect(self, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=True,  # loopback, between two processes of one user; the secret authenticates
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors],
        )


def _pull(client: RuntimeHttpClient) -> tuple[Message, Context]:
    """Take over a task's message and context. The answer brings the app bundle along; it is dropped unread."""
    task = client.PullTaskInput(PullTaskInputRequest())
    context = context_from_proto(task.context)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, task.run.run_id, context.node_id
    pulled = client.PullMessages(PullAppMessagesRequest())
    tree = pulled.message_object_trees[0]
    node = Node(node_id=context.node_id)
    message = pull_and_inflate_object_from_tree(
        tree,
        make_pull_object_fn_protobuf(client.PullObject, node, context.run_id),
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id),
        return_type=Message,
        initial_backoff=BACKOFF_S,
    )
    message.metadata.__dict__["_message_id"] = tree.object_id  # a deflated message does not carry its own name
    return message, context


def _heartbeat(client: RuntimeHttpClient) -> Callable[[], bool]:
    """Say that the task is alive. Flower's own function ends the process when the task is gone; a warm one stays."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    return beat


def main(
    arguments: Sequence[str] | None = None,
    *,
    open_site: Callable[[Path], SiteLike] | None = None,
    round_function: RoundFunction | None = None,
    finish_function: FinishFunction | None = None,
) -> None:
    """Open the site and serve. The functions are parameters for tests only: no message can name them."""
    die_with_parent()
    parser = argparse.ArgumentParser(description="The hospital's locked runner.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--runtime-api", required=True, help="host:port of the SuperNode's runtime API")
    options = parser.parse_args(arguments)
    if open_site is None:
        from site_client.site import Site

        open_site = Site.open
    if round_function is None or finish_function is None:
        from site_client.local_round import finish, local_round

        round_function, finish_function = round_function or local_round, finish_function or finish
    open_logs(options.site, sys.stderr)
    try:
        secret = read_secret(options.site / "keys" / "superexec.secret", "the secret of SuperNode and worker")
        site = open_site(options.site)
    except Refused as refusal:
        _LOG.error("%s", refusal)
        # The supervisor shows this line: the code and no more, for it is in worker.log, too.
        operator = "logs/operator.log in the site's folder"
        raise SystemExit(f"{refusal.code}: the site cannot be opened. Next: read {operator}.") from None
    runner = Runner(options.runtime_api, secret, client_app(site, round_function, finish_function))
    write_file(options.site / READY_FILE, b"")
    event(Event.READY)
    runner.serve()


if __name__ == "__main__":
    main()
