"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported: tests share few cores
os.environ.setdefault("MPLBACKEND", "Agg")
# Before gRPC is imported: this process runs gRPC servers and starts programs by fork, and gRPC's fork handlers may
# abort a child before it becomes the program.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real, de-identified MRI that is not part of the repository.

    `SSPFORMER_SHARED_DATA` names it; without that, `../shared/data` beside the repository. On a machine without it the
    tests that need it skip and say so; in continuous integration (`CI=true`) its absence is a failure.
    """
    folder = Path(os.environ.get("SSPFORMER_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if folder.is_dir():
        return folder
    message = f"no real MRI at {folder}: set SSPFORMER_SHARED_DATA to a folder that holds hospital-a, hospital-b, ..."
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(message)
    pytest.skip(message)
