"""The Flower server app: Flower's Grid as the transport of `central/rounds.py`. Nothing is decided here.

SuperExec starts it from an app bundle that holds no code, only the name of this module; it is imported from the
installed distribution. The run's name comes with Flower's run configuration, the coordinator's folder from the
environment of the SuperExec, so that no path of this machine travels to a site.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import pull_objects

from central.app_bundle import STATE_VARIABLE
from central.federation import Federation
from central.registry import Publication, SiteRegistry
from central.rounds import Reply, Request, Run, run_rounds
from central.store import RUN_NAME, RunStore, head_shapes, open_run, runs_folder
from sspformer.contract.errors import Code, Refused
from sspformer.contract.supervise import die_with_parent
from sspformer.contract.tensors import DTYPE, STYPE

_UPDATE, _CONFIG, _METRICS = "update", "config", "metrics"
_log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the run that the run configuration names."""
    die_with_parent()
    federation = Federation.open(Path(os.environ[STATE_VARIABLE]))
    name = str(context.run_config["run"])
    registry = SiteRegistry(federation.sites_path)

    def admitted() -> dict[str, str]:
        return {site.name: site.node_public_key for site in registry.sites()}

    try:
        key = federation.signing_key()
        store, plan = open_run(federation, name)
        sites = tuple(sorted(admitted()))
        shapes = head_shapes(Publication(federation).blob_path(plan.head))
    except Refused as refusal:  # whoever submitted the run waits for its folder to say something
        _say_failed(federation, name, refusal)
        raise
    with store.locked(wait_s=10.0):
        try:
            run_rounds(Run(plan, sites, shapes, store, key, GridTransport(grid, admitted)))
        except Refused as refusal:
            store.set_status("failed", code=refusal.code.value, message=str(refusal), round=store.last_round())
            raise


def _say_failed(federation: Federation, name: str, refusal: Refused) -> None:
    """Write why a run was not even taken up, unless there is no such run or a living process works on it."""
    store = RunStore(runs_folder(federation) / name)
    if RUN_NAME.fullmatch(name) and store.folder.is_dir() and not store.is_held():
        store.set_status("failed", code=refusal.code.value, message=str(refusal), round=store.last_round())


class GridTransport:
    """Sites over Flower's Grid. A site is named by its registered key, never by what a node says of itself.

    Args:
        grid: Flower's Grid of this run.
        sites: gives the OpenSSH public key of each admitted site's node, by site name. Asked again and again: a site
            that was removed is asked no more, and its answer is not taken.
    """

    def __init__(self, grid: Grid, sites: Callable[[], Mapping[str, str]]) -> None:
        self._grid = grid
        self._sites = sites
        self._names = _by_key(sites())
        self._nodes: dict[str, int] = {}
        self._out: dict[str, tuple[str, Request]] = {}
        # A reply is visible a moment before its tensors are; Flower then waits 1 s before it looks again.
        if pull_objects.__kwdefaults__ is not None:
            pull_objects.__kwdefaults__["initial_backoff"] = 0.05

    def online(self) -> dict[str, str]:
        """Connected admitted sites; the stamp is the moment of their node's last activation."""
        try:
            self._names = _by_key(self._sites())
        except Refused as refusal:  # a register that is damaged in the middle of a run does not end the run
            _log.warning("the sites of the last look are kept: %s", refusal)
        stamps: dict[str, str] = {}
        for node in self._grid.get_nodes():
            name = self._names.get(bytes(node.public_key))
            if name is not None:
                self._nodes[name] = node.node_id
                stamps[name] = node.last_activated_at
        return stamps

    def send(self, requests: Mapping[str, Request]) -> None:
        """Push one message to each named site."""
        names = sorted(requests)
        messages = [self._message(self._nodes[name], requests[name]) for name in names]
        for name, message_id in zip(names, self._grid.push_messages(messages), strict=True):
            if message_id is not None:
                self._out[message_id] = (name, requests[name])

    def receive(self) -> Sequence[Reply]:
        """Pull what was answered. Flower's own error replies (a crashed worker, say) become a code.

        Each message is asked for alone. So a reply that cannot be taken apart is that site's failure and nobody else's,
        and whom a reply is from is told by what was asked, never by what the reply says of itself.
        """
        replies: list[Reply] = []
        admitted = set(self._names.values())
        for message_id, (site, request) in list(self._out.items()):
            if site not in admitted:
                del self._out[message_id]
                replies.append(Reply(site, request.task, code=Code.SIGNATURE.value))
                continue
            try:
                reply = next((_read(m, site, request) for m in self._grid.pull_messages([message_id])), None)
            except httpx.HTTPError:
                raise  # between the server app and its own SuperLink: no site's doing
            except Exception as error:
                _log.warning("a reply of site %s cannot be read: %s", site, type(error).__name__)
                reply = Reply(site, request.task, code=Code.FORMAT.value)
            if reply is not None:
                del self._out[message_id]
                if reply.code is not None and not self._is_admitted(site):
                    # The SuperLink notices that a removed node is gone before the next look at the register does.
                    reply = Reply(site, request.task, code=Code.SIGNATURE.value)
                replies.append(reply)
        return replies

    def _is_admitted(self, site: str) -> bool:
        try:
            return site in self._sites()
        except Refused:  # a damaged register removes nobody
            return True

    @staticmethod
    def _message(node_id: int, request: Request) -> Message:
        content = RecordDict(
            {
                "global": ArrayRecord({"delta": Array(DTYPE, (len(request.tensors),), STYPE, request.tensors)}),
                _CONFIG: ConfigRecord({"plan": request.plan, "task": request.task}),
            }
        )
        return Message(
            content=content,
            dst_node_id=node_id,
            message_type=MessageType.TRAIN,
            ttl=request.ttl_s,
            group_id=str(request.round),
        )


def _read(message: Message, site: str, request: Request) -> Reply:
    """Take apart what a site sent. Whatever is not as agreed counts as a failure of that site."""
    if message.has_error():
        return Reply(site, request.task, code=Code.INTERNAL.value)
    content = message.content
    code = content.config_records.get(_CONFIG, ConfigRecord()).get("code")
    if code is not None:
        return Reply(site, request.task, code=code if isinstance(code, str) else Code.FORMAT.value)
    arrays = content.array_records.get(_UPDATE, ArrayRecord())
    tensors = arrays["delta"].data if "delta" in arrays else b""
    if not isinstance(tensors, bytes):
        raise TypeError("the tensors of a reply are no bytes")
    return Reply(site, request.task, tensors, dict(content.metric_records.get(_METRICS, {})))


def _by_key(sites: Mapping[str, str]) -> dict[bytes, str]:
    return {_key_bytes(key): name for name, key in sites.items()}


def _key_bytes(openssh: str) -> bytes:
    """A node's public key as the SuperLink keeps it."""
    key = load_ssh_public_key(openssh.encode())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
