"""What training and evaluation at a site work on: the cohort with its cached features, and the head to start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from site_client.folder import SiteFolder
from sspformer.checkpoint import file_digest, load_encoder, load_head, read_gradient_rms
from sspformer.contract.errors import Code, Refused
from sspformer.data.cache import FeatureCache
from sspformer.data.cohort import Cohort, open_cohort
from sspformer.model.assembly import Architecture, Head
from sspformer.tasks.denoise import Denoise

MAX_SLICES = 6  # per scan; enough to cover a head, few enough for a site's disk


@dataclass(frozen=True)
class Artifacts:
    """Files of a frozen encoder and of the head to start from; digests where they are known beforehand."""

    encoder: Path
    head: Path
    encoder_digest: str | None = None
    head_digest: str | None = None


@dataclass
class Workspace:
    """An opened cohort and the published head, with what its file says about its gradients on public data."""

    arch: Architecture
    encoder_digest: str
    task: Denoise
    cohort: Cohort
    published: dict[str, torch.Tensor]
    gradient_rms: dict[str, float]
    device: torch.device

    def head_at(self, delta: Mapping[str, np.ndarray]) -> Head:
        """The published head moved by a difference; tensors that `delta` does not name stay."""
        head = Head(self.arch).to(self.device)
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                parameter.copy_(self.published[name])
                if name in delta:
                    parameter += torch.from_numpy(delta[name]).to(self.device)
        return head.eval()

    def head_of(self, path: Path) -> Head:
        """A head from a file.

        Raises:
            Refused: E-TENSORS where it was made for another encoder.
        """
        head, _ = load_head(path, of=self.arch, encoder_digest=self.encoder_digest)
        return head.to(self.device).eval()


def open_workspace(
    files: SiteFolder,
    artifacts: Artifacts,
    contrasts: tuple[str, ...],
    noise_sigma: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Workspace:
    """Read the site's images once and keep their features on disk; later calls find them there.

    Raises:
        Refused: E-CONFIG, E-DATA, E-DIGEST, E-FORMAT or E-TENSORS.
    """
    # One thread count for the life of the process: sums depend on it in their last bits.
    torch.set_num_threads(files.config.threads)
    device = torch.device(files.config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refused(
            Code.CONFIG,
            f"{files.config_path}: device is cuda, but no GPU is available.",
            "set device: cpu, or install a GPU build of torch.",
        )
    encoder, arch = load_encoder(artifacts.encoder, artifacts.encoder_digest)
    digest = artifacts.encoder_digest or file_digest(artifacts.encoder)
    head, _ = load_head(artifacts.head, artifacts.head_digest, of=arch, encoder_digest=digest)
    task = Denoise(noise_sigma)
    cache = FeatureCache(files.root / "cache", encoder.to(device), digest, task, arch.size_px, MAX_SLICES)
    cohort = open_cohort(files.data, contrasts, cache, progress=progress)
    published = {name: p.detach().clone().to(device) for name, p in head.named_parameters()}
    return Workspace(arch, digest, task, cohort, published, read_gradient_rms(artifacts.head), device)
