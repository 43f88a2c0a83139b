"""Flower's Grid as a transport: what a site sends is taken apart one message at a time, and junk is that site's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from central.app import GridTransport
from central.rounds import Reply, Request
from sspformer.contract.errors import Code, Refused

REQUEST = Request(b"plan", b"task", b"tensors", 1, "train", 60.0)
NAMES = ("alpha", "bravo", "charlie")


def good(name: str) -> Any:
    """A reply as our client app makes it."""
    content = RecordDict(
        {
            "update": ArrayRecord({"delta": Array("float16", (3,), "fp16.shuffle.zstd", name.encode())}),
            "metrics": MetricRecord({"steps": 2}),
        }
    )
    return SimpleNamespace(has_error=lambda: False, content=content, metadata=SimpleNamespace())


class Grid:
    """Gives each message what the test laid there; what is callable is called, as inflating would."""

    def __init__(self, mail: dict[str, Any]) -> None:
        self.mail = mail
        self.asked: list[list[str]] = []

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(public_key=key, node_id=i, last_activated_at="t") for i, key in enumerate(KEYS.values())
        ]

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        return [f"id-{message.metadata.dst_node_id}" for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        ids = list(message_ids)
        self.asked.append(ids)
        found = [self.mail.pop(message_id) for message_id in ids if message_id in self.mail]
        return [item() if callable(item) else item for item in found]


PRIVATE = {name: ec.generate_private_key(ec.SECP384R1()).public_key() for name in NAMES}
KEYS = {name: key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for name, key in PRIVATE.items()}
SITES = {name: key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for name, key in PRIVATE.items()}


def sending(mail: dict[str, Any], sites: Callable[[], dict[str, str]]) -> GridTransport:
    """A transport that has asked three sites."""
    transport = GridTransport(Grid(mail), sites)  # type: ignore[arg-type]
    assert list(transport.online()) == list(NAMES)
    transport._message = staticmethod(  # type: ignore[method-assign]
        lambda node, request: SimpleNamespace(metadata=SimpleNamespace(dst_node_id=node))
    )
    transport.send(dict.fromkeys(NAMES, REQUEST))
    return transport


def received(mail: dict[str, Any]) -> dict[str, Reply]:
    """Send to three sites, then receive twice."""
    transport = sending(mail, lambda: SITES)
    replies = [*transport.receive(), *transport.receive()]
    assert len(replies) == len({reply.site for reply in replies})
    return {reply.site: reply for reply in replies}


def raising(error: Exception) -> Callable[[], Any]:
    def inflate() -> Any:
        raise error

    return inflate


def with_content(content: Any) -> Any:
    return SimpleNamespace(has_error=lambda: False, content=content, metadata=None)


def records(**changes: Any) -> Any:
    plain = {"config_records": {}, "array_records": {}, "metric_records": {}}
    return with_content(SimpleNamespace(**(plain | changes)))


JUNK = {
    "bytes that do not inflate": raising(ValueError("junk")),
    "a tree that never ends": raising(RecursionError()),
    "text that is none": raising(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")),
    "no message": None,
    "no content": with_content(None),
    "arrays that are none": records(array_records={"update": 5}),
    "no array": records(array_records={"update": {"delta": np.zeros(3)}}),
    "a text in place of tensors": records(array_records={"update": {"delta": SimpleNamespace(data="text")}}),
    "metrics that are none": records(metric_records={"metrics": 7}),
    "a code that is none": records(config_records={"config": ConfigRecord({"code": [1, 2]})}),
    "another object": SimpleNamespace(),
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK.keys())
def test_a_malformed_reply_is_a_failure_of_its_site_alone(junk: Any) -> None:
    replies = received({"id-0": good("alpha"), "id-1": junk, "id-2": good("charlie")})
    assert replies["bravo"].code == "E-FORMAT"
    assert replies["bravo"].tensors == b""
    for name in ("alpha", "charlie"):
        assert (replies[name].code, replies[name].tensors) == (None, name.encode())


def test_a_site_cannot_answer_in_the_name_of_another() -> None:
    forged = good("bravo")
    forged.metadata = SimpleNamespace(reply_to_message_id="id-0")
    replies = received({"id-1": forged})
    assert list(replies) == ["bravo"]


def test_a_superlink_that_is_gone_is_no_failure_of_a_site() -> None:
    with pytest.raises(httpx.ConnectError):
        received({"id-1": raising(httpx.ConnectError("refused"))})


def test_a_removed_site_is_asked_no_more_and_its_answer_is_not_taken() -> None:
    sites = dict(SITES)
    transport = sending({"id-0": good("alpha"), "id-1": good("bravo")}, lambda: sites)
    del sites["bravo"]
    assert list(transport.online()) == ["alpha", "charlie"]
    replies = {reply.site: reply for reply in transport.receive()}
    assert replies["alpha"].code is None
    assert (replies["bravo"].code, replies["bravo"].tensors) == ("E-SIGNATURE", b"")


def test_a_register_that_is_damaged_in_the_middle_of_a_run_does_not_end_it() -> None:
    looks = iter([SITES, SITES])

    def sites() -> dict[str, str]:
        try:
            return next(looks)
        except StopIteration:
            raise Refused(Code.STATE, "sites.json is damaged.", "Restore it.") from None

    assert list(sending({}, sites).online()) == list(NAMES)
