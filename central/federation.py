"""The coordinator's folder: where everything lies, and how it is made."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from central.authority import Authority, certificate_pem, general_name, key_pem
from central.config import CentralConfig, is_loopback
from sspformer.contract.durable import make_private_folder, write_file, write_secret
from sspformer.contract.errors import Code, Refused
from sspformer.contract.keys import fingerprint, load_private, save_private


@dataclass(frozen=True)
class Federation:
    """An existing coordinator's folder and its configuration."""

    root: Path
    config: CentralConfig

    @classmethod
    def open(cls, root: Path) -> Federation:
        """Open a folder that `central init` made.

        Raises:
            Refused: E-CONFIG when it has no valid `central.yaml`.
        """
        return cls(root, CentralConfig.load(root / "central.yaml"))

    @property
    def keys(self) -> Path:
        """Folder of keys and certificates (0700)."""
        return self.root / "keys"

    @property
    def signing_key_path(self) -> Path:
        """Ed25519 key that seals manifests, plans, rounds and admissions."""
        return self.keys / "signing.pem"

    @property
    def ca_certificate_path(self) -> Path:
        """Certificate of the federation's authority."""
        return self.keys / "ca.pem"

    @property
    def ca_key_path(self) -> Path:
        """Key of the federation's authority."""
        return self.keys / "ca.key"

    @property
    def server_certificate_path(self) -> Path:
        """Certificate of the gateway and of the SuperLink."""
        return self.keys / "server.pem"

    @property
    def server_key_path(self) -> Path:
        """Key of the gateway and of the SuperLink."""
        return self.keys / "server.key"

    @property
    def superexec_secret_path(self) -> Path:
        """Secret shared by the SuperLink and the processes that run its tasks."""
        return self.keys / "superexec.secret"

    @property
    def sites_path(self) -> Path:
        """Register of admitted sites."""
        return self.root / "registry" / "sites.json"

    @property
    def blobs(self) -> Path:
        """Folder of published files, each under its digest."""
        return self.root / "blobs"

    @property
    def manifest_path(self) -> Path:
        """The sealed manifest."""
        return self.blobs / "manifest.json"

    def signing_key(self) -> Ed25519PrivateKey:
        """Read the coordinator's signing key.

        Raises:
            Refused: E-STATE.
        """
        return load_private(self.signing_key_path)

    def authority(self) -> Authority:
        """Read the federation's certificate authority.

        Raises:
            Refused: E-STATE.
        """
        return Authority.load(self.ca_key_path, self.ca_certificate_path)

    def cover_addresses(self) -> None:
        """Issue the server's certificate again when `central.yaml` names an address that it does not hold.

        Raises:
            Refused: E-STATE when a key or certificate is missing or damaged.
        """
        wanted = [self.config.host, self.config.superlink_address, self.config.gateway_address]
        try:
            old = x509.load_pem_x509_certificate(self.server_certificate_path.read_bytes())
            held = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            public = old.public_key()
        except (OSError, ValueError, x509.ExtensionNotFound):
            raise self._no_server_certificate() from None
        if all(general_name(address) in held for address in wanted):
            return
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise self._no_server_certificate()
        new = self.authority().issue_server(public, self.config.host, self.config.name, *wanted)
        write_file(self.server_certificate_path, certificate_pem(new))

    def _no_server_certificate(self) -> Refused:
        return Refused(
            Code.STATE,
            f"{self.server_certificate_path} is missing or damaged.",
            "Restore it from the backup of this folder.",
        )


def create(root: Path, *, name: str, host: str, gateway_port: int, superlink_port: int) -> list[str]:
    """Make a coordinator's folder with all its keys; `central.yaml` is written last and marks it whole.

    Returns:
        Lines for the operator, the key's fingerprint among them.

    Raises:
        Refused: E-CONFIG for a bad option; E-STATE when the folder already holds a coordinator, whole or in part.
    """
    config = CentralConfig.make(name=name, host=host, gateway_port=gateway_port, superlink_port=superlink_port)
    federation = Federation(root, config)
    if (root / "central.yaml").exists() or federation.keys.exists():
        raise Refused(
            Code.STATE,
            f"{root} already holds a coordinator; its keys are not overwritten.",
            "Name another folder, or move this one away if it is really no longer needed.",
        )
    try:
        for folder in (root, federation.keys, federation.sites_path.parent, federation.blobs):
            make_private_folder(folder)
    except OSError as error:
        raise Refused(
            Code.STATE, f"{root} cannot be made ({error.strerror}).", "Name a folder you may write."
        ) from None
    signing = Ed25519PrivateKey.generate()
    save_private(federation.signing_key_path, signing)
    authority = Authority.create(name)
    authority.save(federation.ca_key_path, federation.ca_certificate_path)
    server = ec.generate_private_key(ec.SECP256R1())
    write_secret(federation.server_key_path, key_pem(server))
    certificate = authority.issue_server(server.public_key(), host, name)
    write_file(federation.server_certificate_path, certificate_pem(certificate))
    write_secret(federation.superexec_secret_path, secrets.token_hex(32).encode())
    config.save(root / "central.yaml")
    lines = [
        f"Made the coordinator of {name} in {root}.",
        f"Fingerprint of its key, to read out to each hospital: {fingerprint(signing.public_key())}",
    ]
    if not is_loopback(host):
        lines.append(f"The SuperLink listens on this machine only; read on superlink_bind in {root / 'central.yaml'}.")
    return [*lines, "Next: central publish, then central admit for each hospital's request."]
