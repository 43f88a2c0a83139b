"""A small dataset, a small encoder and a cache over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sspformer.data.cache import FeatureCache
from sspformer.data.cohort import Cohort, open_cohort
from sspformer.model.assembly import build_encoder
from sspformer.model.encoder import Encoder
from sspformer.tasks.denoise import Denoise
from tests.phantom import MINI, write_dataset


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini_encoder() -> Encoder:
    torch.manual_seed(3)
    return build_encoder(MINI).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight patients; read only."""
    return write_dataset(tmp_path_factory.mktemp("bids") / "data", 8)


@pytest.fixture
def make_cache(tmp_path: Path, mini_encoder: Encoder) -> Callable[..., FeatureCache]:
    def make(
        folder: Path | None = None, digest: str = "sha256:mini", sigma: float = 0.1, **changes: int
    ) -> FeatureCache:
        numbers = {"size_px": MINI.size_px, "max_slices": 3} | changes
        return FeatureCache(folder or tmp_path / "cache", mini_encoder, digest, Denoise(sigma), **numbers)

    return make


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory, dataset: Path, mini_encoder: Encoder) -> Cohort:
    """The dataset, cached; read only."""
    cache = FeatureCache(tmp_path_factory.mktemp("cache"), mini_encoder, "sha256:mini", Denoise(0.1), MINI.size_px, 3)
    return open_cohort(dataset, ("T1w",), cache)
