"""The generated code is what the .proto file says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

NAMES = ["gateway_pb2.py", "gateway_pb2.pyi", "gateway_pb2_grpc.py"]


def test_generated_code_is_fresh(tmp_path):
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", f"--python_out={tmp_path}"]
    command += [f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", "sspformer/contract/gateway.proto"]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in NAMES:
        assert (tmp_path / "sspformer" / "contract" / name).read_text() == (
            ROOT / "sspformer" / "contract" / name
        ).read_text(), f"{name} is stale: run `make proto`"


@pytest.mark.parametrize(
    "module", ["sspformer.contract.gateway_pb2_grpc", "central.gateway.server", "central.admission"]
)
def test_it_does_not_bring_torch(module):
    script = f"import sys, {module}; assert 'torch' not in sys.modules; assert 'nibabel' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
