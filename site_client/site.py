"""An opened site: its configuration, its pinned key, and what stays warm between rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from site_client.config import SiteConfig
from site_client.folder import SiteFolder
from site_client.policy import Policy
from site_client.privacy.events import Events
from site_client.workspace import Artifacts, Workspace, open_workspace
from sspformer.checkpoint import load_head
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import RunPlan
from sspformer.contract.tensors import Shapes
from sspformer.data.bids import read_dataset
from sspformer.data.split import split


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
        """Open a site that has joined. Budget that a dead worker reserved and never used is free again.

        Raises:
            Refused: E-CONFIG or E-STATE where it has not, or its files are damaged.
        """
        files = SiteFolder.open(folder)
        coordinator_key = files.coordinator_key()
        # The worker is the only one that reserves, and this is its start: no reservation can be in use now.
        Events(folder / "privacy").release_never_started()
        return cls(folder, files, coordinator_key)

    @property
    def name(self) -> str:
        """The site's name."""
        return self.files.config.name

    def read_policy(self) -> Policy:
        """The site's own caps as its file says now: what the hospital tightens counts from the next task on.

        Raises:
            Refused: E-CONFIG where the file cannot be read; the caps it had before may be the ones it was to replace.
        """
        return SiteConfig.load(self.files.config_path).policy

    def listed_patients(self, plan: RunPlan) -> int:
        """Training patients by the folder's listing alone; no image is opened."""
        train, _ = split(read_dataset(self.files.data, plan.contrasts).subjects)
        return len(train)

    def head_shapes(self, plan: RunPlan) -> Shapes:
        """Names and shapes of every tensor of the plan's published head."""
        key = f"{plan.encoder} {plan.head}"
        if key not in self._shapes:
            head, _ = load_head(self._artifact(plan.head), plan.head, encoder_digest=plan.encoder)
            self._shapes[key] = {name: tuple(p.shape) for name, p in head.named_parameters()}
        return self._shapes[key]

    def prepare(self, plan: RunPlan) -> Workspace:
        """The plan's workspace; the first call reads the site's images and fills the feature cache.

        The listing is compared each time, so that a subject who opted out between two rounds is gone in the next, and a
        scan that was added or replaced is read. A cache entry that somebody removed is made again now, before
        a private round is charged, and not found missing in the middle of it.

        Raises:
            Refused: E-DATA, E-DIGEST, E-FORMAT or E-TENSORS.
        """
        key = repr((plan.encoder, plan.head, plan.contrasts, plan.noise_sigma, self._listing(plan)))
        warm = self._workspaces.get(key)
        if warm is None or not warm.cohort.is_whole():
            artifacts = Artifacts(self._artifact(plan.encoder), self._artifact(plan.head), plan.encoder, plan.head)
            self._workspaces = {key: open_workspace(self.files, artifacts, plan.contrasts, plan.noise_sigma)}
        return self._workspaces[key]

    def _listing(self, plan: RunPlan) -> list[tuple[str, int, int]]:
        """Every scan that the plan asks for: path, size and time of change."""
        listed = []
        for scans in read_dataset(self.files.data, plan.contrasts).subjects.values():
            for scan in scans:
                try:
                    status = scan.path.stat()
                except OSError:  # a dead link, say: reading it will be refused and reported
                    listed.append((str(scan.path), -1, -1))
                else:
                    listed.append((str(scan.path), status.st_size, status.st_mtime_ns))
        return sorted(listed)

    def _artifact(self, digest: str) -> Path:
        path = self.files.store / digest.replace(":", "-")
        if not path.exists():
            raise Refused(Code.STATE, f"artifact {digest[:19]}… is not in the site's store.", "run: site-client fetch")
        return path
