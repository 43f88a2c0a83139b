"""One test per private name of Flower that we use, so that an upgrade fails here and loudly. Needs no process."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
from flwr.app import Array, Message
from flwr.cli.config_utils import load_and_validate
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse, PullTaskInputResponse
from flwr.serverapp.strategy import FedAdam, FedTrimmedAvg, Krum
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable import inflatable_utils
from flwr.superlink.grid import HttpGrid
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient

from central import app as central_app
from central.app_bundle import _BUNDLE
from site_client import worker
from site_client.supernode import PromptFleetClient


def test_the_version_is_the_one_that_these_names_were_read_in() -> None:
    assert version("flwr").startswith("1.41.")


def test_the_grid_polls_when_we_say_so_and_knows_keys_and_activations() -> None:
    assert {"push_messages", "pull_messages", "get_nodes"} <= set(dir(HttpGrid))
    assert {"node_id", "public_key", "last_activated_at"} <= set(NodeInfo.DESCRIPTOR.fields_by_name)
    assert "time.sleep(3)" in inspect.getsource(HttpGrid.send_and_receive)  # why it is not used


def test_the_pause_before_tensors_are_pulled_again_can_be_set_in_both_ways() -> None:
    assert inflatable_utils.pull_objects.__kwdefaults__["initial_backoff"] == pytest.approx(1.0, abs=0.96)
    assert "initial_backoff" in inspect.signature(inflatable_utils.pull_and_inflate_object_from_tree).parameters
    assert central_app.pull_objects is inflatable_utils.pull_objects
    assert "pull_objects(" in inspect.getsource(HttpGrid.pull_messages)


def test_the_supernode_takes_its_fleet_client_from_the_name_that_is_exchanged() -> None:
    source = inspect.getsource(fleet_http_connection.http_request_response)
    assert "with FleetHttpClient.from_server_address(" in source
    assert issubclass(PromptFleetClient, FleetHttpClient)
    for name in ("ActivateNode", "DeactivateNode", "PullMessages", "PullObject", "PushMessages"):
        ours, theirs = getattr(PromptFleetClient, name), getattr(FleetHttpClient, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
        assert f"client.{name}" in source
    assert "time.sleep(3)" in inspect.getsource(start_client_internal.start_client_internal)  # what is gone round
    assert "clientapp_runtime_list=[clientapp_runtime]" in source


def test_the_runtime_api_gives_tasks_by_type_and_brings_the_bundle_unasked() -> None:
    assert str(TaskType.CLIENT_APP) == "flwr-clientapp"
    assert "supported_task_types" in AcquireTaskRequest.DESCRIPTOR.fields_by_name
    assert {"task", "token"} <= set(AcquireTaskResponse.DESCRIPTOR.fields_by_name)
    assert "fab" in PullTaskInputResponse.DESCRIPTOR.fields_by_name


def test_the_worker_never_names_the_bundle() -> None:
    """Neither the bundle's bytes nor any of Flower's functions that unpack or import one are in the worker's reach."""
    code = "\n".join(line for line in inspect.getsource(worker).splitlines() if not line.strip().startswith(("#", '"')))
    for name in (".fab", "fab_from_proto", "install_from_fab", "load_client_app", "load_app", "import_module", "exec("):
        assert name not in code


def test_flowers_own_helpers_that_the_worker_uses_keep_their_signatures() -> None:
    assert list(inspect.signature(worker.push_message).parameters) == ["client", "message", "context"]
    assert list(inspect.signature(worker.push_task_output).parameters) == ["client", "context", "sub_status", "details"]
    assert {"is_running", "start", "stop"} <= set(dir(worker.HeartbeatSender))
    parameters = inspect.signature(worker.SuperExecAuthHttpInterceptor).parameters
    assert {"master_secret", "protected_methods"} <= set(parameters)


def test_strategies_read_a_reply_by_content_and_error_and_keep_moments_where_we_look() -> None:
    adam = FedAdam(eta=1.0, tau=1.0)
    assert (adam.current_arrays, adam.m_t, adam.v_t) == (None, None, None)
    assert "beta" in inspect.signature(FedTrimmedAvg).parameters
    assert "num_malicious_nodes" in inspect.signature(Krum).parameters
    assert callable(Message.has_error)


def test_an_array_of_our_own_stype_passes_through() -> None:
    array = Array("float16", (3,), "fp16.shuffle.zstd", b"abc")
    assert Array.inflate(array.deflate(), children=dict(array.children)).data == b"abc"


def test_flower_demands_a_client_app_and_accepts_our_bundle(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(_BUNDLE)
    config, _ = load_and_validate(path)
    assert config["tool"]["flwr"]["app"]["components"]["serverapp"] == "central.app:app"
    path.write_text(_BUNDLE.replace('clientapp = "site_client.app:app"\n', ""))
    with pytest.raises(ValueError, match="clientapp"):
        load_and_validate(path)
