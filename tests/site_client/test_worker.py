"""The worker goes on, whatever the SuperNode hands it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from flwr.clientapp import ClientApp
from flwr.common import Context, RecordDict
from flwr.common.serde import context_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import (
    AcquireTaskResponse,
    PullAppMessagesResponse,
    PullTaskInputResponse,
    PushTaskOutputResponse,
)

from site_client import worker
from site_client.worker import Runner

Node = dict[str, Callable[[], object]]


def claim() -> object:
    response = AcquireTaskResponse(token="token")
    response.task.SetInParent()
    return response


def task_input() -> object:
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    return PullTaskInputResponse(context=context_to_proto(context))


def raises(error: Exception) -> Callable[[], object]:
    def answer() -> object:
        raise error

    return answer


SOUND: Node = {"AcquireTask": claim, "PullTaskInput": task_input, "PushTaskOutput": PushTaskOutputResponse}
MALFORMED: dict[str, Node] = {
    "a task that cannot be acquired": {"AcquireTask": raises(ValueError("sub-Miller"))},
    "a task that cannot be parsed": {"PullTaskInput": raises(ValueError("sub-Miller"))},
    "no message in the task": {"PullMessages": PullAppMessagesResponse},  # IndexError
    "a message without content": {
        "PullMessages": lambda: PullAppMessagesResponse(message_object_trees=[ObjectTree(object_id="sub-Miller")]),
    },
    "an object that is none": {"PullMessages": raises(KeyError("sub-Miller"))},
    "an output that is not taken": {
        "PullMessages": PullAppMessagesResponse, "PushTaskOutput": raises(TypeError("sub-Miller")),
    },
}  # fmt: skip


class FakeClient:
    """What a SuperNode answers, call by call."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[[object], object]:
        def call(request: object) -> object:
            self.calls.append(name)
            if name not in self._node:
                raise ValueError(f"not expected: {name} sub-Miller")
            return self._node[name]()

        return call

    def close(self) -> None:
        self.calls.append("close")


class Beat:
    """No thread that calls a SuperNode which is not there."""

    is_running = True
    stopped = 0

    def __init__(self, function: object) -> None:
        pass

    def start(self) -> None:
        pass

    def stop(self) -> None:
        type(self).stopped += 1


@pytest.fixture
def make_runner(monkeypatch):
    monkeypatch.setattr(worker, "AWAY_S", 0.0)
    monkeypatch.setattr(worker, "HeartbeatSender", Beat)
    monkeypatch.setattr(Beat, "stopped", 0)

    def make(node: Node) -> tuple[Runner, FakeClient]:
        client = FakeClient(SOUND | node)
        monkeypatch.setattr(Runner, "_connect", lambda own, *interceptors: client)
        return Runner("127.0.0.1:1", b"secret", ClientApp()), client

    return make


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_message_does_not_end_the_worker(make_runner, monkeypatch, name):
    seen: list[str] = []
    monkeypatch.setattr(worker, "event", lambda what, **numbers: seen.append(what.value))
    runner, client = make_runner(MALFORMED[name])
    for _ in range(3):
        runner.take_one()
    assert seen == ["E-FORMAT"] * 3
    if "acquired" not in name:
        assert client.calls.count("PushTaskOutput") == 3, "the SuperNode is told that the task has failed"
        assert client.calls.count("close") == Beat.stopped == 3


def test_no_task_is_no_event(make_runner, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(worker, "event", lambda what, **numbers: seen.append(what.value))
    runner, _ = make_runner({"AcquireTask": AcquireTaskResponse})
    assert not runner.take_one()
    assert seen == []


def test_a_site_that_cannot_be_opened_says_a_code_and_tells_the_operator_why(tmp_path):
    site = tmp_path / "ward-Miller"
    site.mkdir()
    command = [sys.executable, "-m", "site_client.worker", str(site), "--runtime-api", "127.0.0.1:1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "Miller" not in ended.stdout + ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert re.fullmatch(r"E-STATE: (.*) Next: (.*)", last), "the form in which the supervisor shows it"
    assert str(site / "keys" / "superexec.secret") in (site / "logs" / "operator.log").read_text()
