"""The hospital's folder: where everything lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from site_client.config import Coordinator, SiteConfig
from sspformer.contract.errors import Code, Refused
from sspformer.contract.keys import load_public
from sspformer.contract.manifest import Artifact


@dataclass(frozen=True)
class SiteFolder:
    """An existing site's folder and its configuration."""

    root: Path
    config: SiteConfig

    @classmethod
    def open(cls, root: Path) -> SiteFolder:
        """Open a folder that `site-client init` made.

        Raises:
            Refused: E-CONFIG when it has no valid `site.yaml`.
        """
        return cls(root, SiteConfig.load(root / "site.yaml"))

    @property
    def config_path(self) -> Path:
        """The configuration."""
        return self.root / "site.yaml"

    @property
    def keys(self) -> Path:
        """Folder of keys and certificates (0700)."""
        return self.root / "keys"

    @property
    def store(self) -> Path:
        """Folder of verified downloads, each under its digest."""
        return self.root / "store"

    @property
    def data(self) -> Path:
        """The BIDS dataset."""
        return self.root / self.config.data

    @property
    def tls_key_path(self) -> Path:
        """Key of the TLS client certificate."""
        return self.keys / "tls.key"

    @property
    def tls_certificate_path(self) -> Path:
        """TLS client certificate, issued by the coordinator."""
        return self.keys / "tls.pem"

    @property
    def ca_certificate_path(self) -> Path:
        """Certificate of the federation's authority."""
        return self.keys / "ca.pem"

    @property
    def node_key_path(self) -> Path:
        """Flower node key, OpenSSH: what `flower-supernode --auth-supernode-private-key` takes."""
        return self.keys / "node.key"

    @property
    def node_public_key_path(self) -> Path:
        """Flower node key's public half, OpenSSH: what `flwr supernode register` takes."""
        return self.keys / "node.pub"

    @property
    def signing_key_path(self) -> Path:
        """The site's own Ed25519 key."""
        return self.keys / "signing.pem"

    @property
    def coordinator_key_path(self) -> Path:
        """The coordinator's pinned Ed25519 key: manifests, plans and tasks must be sealed by it."""
        return self.keys / "coordinator.pub"

    @property
    def superexec_secret_path(self) -> Path:
        """Secret shared by the SuperNode and the worker."""
        return self.keys / "superexec.secret"

    @property
    def request_path(self) -> Path:
        """The request to hand to the coordinator."""
        return self.root / "request.json"

    @property
    def manifest_path(self) -> Path:
        """The verified manifest, still sealed."""
        return self.store / "manifest.json"

    def artifact_path(self, artifact: Artifact) -> Path:
        """Where a verified download lies."""
        return self.store / artifact.blob_name

    def coordinator(self) -> Coordinator:
        """Return where the coordinator is.

        Raises:
            Refused: E-CONFIG when this site has not joined yet.
        """
        if self.config.coordinator is None:
            raise Refused(
                Code.CONFIG,
                f"{self.config_path} names no coordinator: this site has not joined a federation.",
                "Run: site-client accept SITE ADMISSION.json --fingerprint HEX",
            )
        return self.config.coordinator

    def coordinator_key(self) -> Ed25519PublicKey:
        """Return the coordinator's pinned key.

        Raises:
            Refused: E-STATE when this site has not joined yet.
        """
        return load_public(self.coordinator_key_path)
