"""An opened site: its configuration, its pinned key, and what stays warm between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from site_client.folder import SiteFolder
from site_client.policy import Policy
from sspformer.checkpoint import load_encoder, load_head
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import RunPlan
from sspformer.contract.tensors import Shapes
from sspformer.data.bids import read_dataset
from sspformer.data.cache import FeatureCache
from sspformer.data.cohort import Cohort, open_cohort
from sspformer.data.split import split
from sspformer.model.assembly import Architecture, Head
from sspformer.tasks.denoise import Denoise

MAX_SLICES = 6  # per scan; enough to cover a head, few enough for a site's disk


@dataclass
class Workspace:
    """What one plan needs, loaded once: the cohort with its cached features, and the published head."""

    arch: Architecture
    task: Denoise
    cohort: Cohort
    published: dict[str, torch.Tensor]
    device: torch.device

    def head_at(self, delta: Mapping[str, np.ndarray]) -> Head:
        """The published head moved by a difference."""
        head = Head(self.arch).to(self.device)
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                parameter.copy_(self.published[name])
                if name in delta:
                    parameter += torch.from_numpy(delta[name]).to(self.device)
        return head.eval()


@dataclass
class Site:
    """A hospital's site, opened by the worker and kept open."""

    folder: Path
    files: SiteFolder
    coordinator_key: Ed25519PublicKey
    _workspaces: dict[str, Workspace] = field(default_factory=dict)
    _shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Site:
        """Open a site that has joined.

        Raises:
            Refused: E-CONFIG or E-STATE where it has not, or its files are damaged.
        """
        files = SiteFolder.open(folder)
        # One thread count for the life of the process: sums depend on it in their last bits.
        torch.set_num_threads(files.config.threads)
        return cls(folder, files, files.coordinator_key())

    @property
    def name(self) -> str:
        """The site's name."""
        return self.files.config.name

    @property
    def policy(self) -> Policy:
        """The site's own caps."""
        return self.files.config.policy

    def listed_patients(self, plan: RunPlan) -> int:
        """Training patients by the folder's listing alone; no image is opened."""
        train, _ = split(read_dataset(self.files.data, plan.contrasts).subjects)
        return len(train)

    def head_shapes(self, plan: RunPlan) -> Shapes:
        """Names and shapes of every tensor of the plan's published head."""
        if plan.head not in self._shapes:
            head, _ = load_head(self._artifact(plan.head), plan.head)
            self._shapes[plan.head] = {name: tuple(p.shape) for name, p in head.named_parameters()}
        return self._shapes[plan.head]

    def prepare(self, plan: RunPlan) -> Workspace:
        """The plan's workspace; the first call reads the site's images and fills the feature cache.

        The listing is compared each time, so that a subject who opted out between two rounds is gone in the next.

        Raises:
            Refused: E-DATA, E-DIGEST, E-FORMAT or E-TENSORS.
        """
        subjects = sorted(read_dataset(self.files.data, plan.contrasts).subjects)
        key = repr((plan.encoder, plan.head, plan.contrasts, plan.noise_sigma, subjects))
        if key not in self._workspaces:
            self._workspaces = {key: self._open_workspace(plan)}
        return self._workspaces[key]

    def _open_workspace(self, plan: RunPlan) -> Workspace:
        device = torch.device(self.files.config.device)
        encoder, arch = load_encoder(self._artifact(plan.encoder), plan.encoder)
        head, head_arch = load_head(self._artifact(plan.head), plan.head)
        if head_arch != arch:
            raise Refused(Code.TENSORS, "the plan's head was made for another encoder.", "tell the coordinator.")
        task = Denoise(plan.noise_sigma)
        cache = FeatureCache(
            self.folder / "cache", encoder.to(device), plan.encoder, task, arch.size_px, max_slices=MAX_SLICES
        )
        cohort = open_cohort(self.files.data, plan.contrasts, cache)
        published = {name: p.detach().clone() for name, p in head.named_parameters()}
        return Workspace(arch, task, cohort, published, device)

    def _artifact(self, digest: str) -> Path:
        path = self.files.store / digest.replace(":", "-")
        if not path.exists():
            raise Refused(Code.STATE, f"artifact {digest[:19]}… is not in the site's store.", "run: site-client fetch")
        return path
