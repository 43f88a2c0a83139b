"""A site's worker whose round is a few random numbers: `python -m tests.federation.trivial SITE --runtime-api ...`.

The update is a function of the site's name, the round and the global head, so that a repeated round gives the same
bytes and fresh rounds never give equal ones. While SITE/hold exists, a round waits: a test can kill things in it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from site_client.folder import SiteFolder
from site_client.worker import main
from sspformer.contract.artifact import read_header
from sspformer.contract.manifest import blob_name
from sspformer.contract.plan import RunPlan
from sspformer.contract.tensors import Shapes, digest_tensors


@dataclass
class TrivialReply:
    update: dict[str, np.ndarray]
    metrics: Mapping[str, float | int] = field(default_factory=dict)


class TrivialSite:
    def __init__(self, root: Path) -> None:
        folder = SiteFolder.open(root)
        self.folder = root
        self.name = folder.config.name
        self.coordinator_key = folder.coordinator_key()
        self._store = folder.store

    def head_shapes(self, plan: RunPlan) -> Shapes:
        header = read_header(self._store / blob_name(plan.head))
        return {name: spec.shape for name, spec in header.tensors.items()}


def trivial_update(name: str, number: int, delta: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    seed = hashlib.sha256(f"{name} {number} {digest_tensors(delta)}".encode()).digest()
    random = np.random.default_rng(list(seed))
    return {key: random.normal(0, 1e-3, value.shape).astype(np.float32) for key, value in delta.items()}


def trivial_round(site: TrivialSite, plan: RunPlan, number: int, delta: Mapping[str, np.ndarray]) -> TrivialReply:
    (site.folder / "training").write_text(str(number))
    while (site.folder / "hold").exists():
        time.sleep(0.02)
    with (site.folder / "trained").open("a") as log:
        log.write(f"{number}\n")
    return TrivialReply(trivial_update(site.name, number, delta), {"patients_bucket": 10, "steps": 1, "secret": 7})


def trivial_finish(site: TrivialSite, plan: RunPlan, delta: Mapping[str, np.ndarray]) -> None:
    (site.folder / "final").write_text(digest_tensors(delta))


if __name__ == "__main__":
    main(open_site=TrivialSite, round_function=trivial_round, finish_function=trivial_finish)
