"""What the coordinator stands for: the sites it admitted, and the files it published."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from pydantic import BaseModel, ConfigDict, ValidationError

from central.federation import Federation
from sspformer.contract.artifact import Header, read_header
from sspformer.contract.canonical import canonical_bytes, parse
from sspformer.contract.durable import sync_folder, write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.joining import SiteName
from sspformer.contract.manifest import (
    MAX_ARTIFACT_BYTES,
    Artifact,
    Manifest,
    blob_name,
    seal_manifest,
    verify_manifest,
)

_MAX_REGISTER_BYTES = 16 << 20
_COPY_BYTES = 1 << 20
_RENEWAL = datetime.timedelta(days=30)


class AdmittedSite(BaseModel):
    """One hospital that may call the gateway and whose node may join runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: SiteName
    serial: str  # of its TLS certificate, hexadecimal
    certificate: str  # PEM
    node_public_key: str  # OpenSSH, ECDSA P-384
    signing_public_key: str  # PEM, Ed25519
    since: str  # ISO 8601, UTC

    def keys_equal(self, other: AdmittedSite) -> bool:
        """Say whether two entries are of the same site with the same keys, whatever their certificates."""
        return (
            self.name == other.name
            and self.node_public_key == other.node_public_key
            and self.signing_public_key == other.signing_public_key
            and _read(self).public_key() == _read(other).public_key()
        )

    def shares_a_key(self, other: AdmittedSite) -> bool:
        """Say whether any of the three keys of two entries is the same."""
        return (
            self.node_public_key == other.node_public_key
            or self.signing_public_key == other.signing_public_key
            or _read(self).public_key() == _read(other).public_key()
        )

    def valid_for(self) -> datetime.timedelta:
        """Return how long the site's certificate still holds; negative when it has run out."""
        return _read(self).not_valid_after_utc - datetime.datetime.now(datetime.UTC)


class SiteRegistry:
    """The register of admitted sites: one JSON file, replaced whole, written under a lock.

    Args:
        path: `registry/sites.json`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def sites(self) -> list[AdmittedSite]:
        """Return the admitted sites in the order of their admission.

        Raises:
            Refused: E-STATE when the register is damaged.
        """
        return self._load()[0]

    def _load(self) -> tuple[list[AdmittedSite], list[AdmittedSite]]:
        """Read the admitted sites and those that were removed."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return [], []
        try:
            register = parse(data, "the register of sites", max_bytes=_MAX_REGISTER_BYTES)
            admitted, removed = register["sites"], register.get("removed", [])
            return [AdmittedSite.model_validate(e) for e in admitted], [AdmittedSite.model_validate(e) for e in removed]
        except (Refused, ValidationError, KeyError, TypeError, AttributeError):
            raise Refused(
                Code.STATE, f"{self._path} is damaged.", "Restore it from the backup of the coordinator's folder."
            ) from None

    def find(self, serial: int) -> AdmittedSite | None:
        """Return the site that holds the certificate with this serial, if it is admitted and still valid today."""
        for site in self.sites():
            if site.serial == f"{serial:x}":
                return site if site.valid_for() > datetime.timedelta(0) else None
        return None

    def admit(self, site: AdmittedSite) -> AdmittedSite:
        """Add a site. The same site with the same keys again returns the entry that is there.

        Within thirty days of its end, or after it, the certificate that is there gives way to the new one.

        Raises:
            Refused: E-STATE when its name, or one of its keys, is another site's, or when a key is that of a removed
                site.
        """
        with self._locked():
            sites, removed = self._load()
            if any(site.shares_a_key(gone) for gone in removed):
                raise _taken(f"Site {site.name} has a key of a site that was removed")
            for known in sites:
                if known.keys_equal(site):
                    if known.valid_for() > _RENEWAL:
                        return known
                    site = site.model_copy(update={"since": known.since})
                    self._write([site if entry is known else entry for entry in sites], removed)
                    return site
                if known.name == site.name:
                    raise _taken(f"Site {site.name} is already admitted with other keys")
                if known.shares_a_key(site):
                    raise _taken(f"A key of {site.name} is already that of site {known.name}")
            self._write([*sites, site], removed)
            return site

    def remove(self, name: str) -> AdmittedSite:
        """Take a site out. Its keys stay on record, so that they are never admitted again.

        Raises:
            Refused: E-STATE when no site of that name is admitted.
        """
        with self._locked():
            sites, removed = self._load()
            gone = next((site for site in sites if site.name == name), None)
            if gone is None:
                raise Refused(Code.STATE, f"No site {name} is admitted.", "List sites: central status STATE")
            self._write([site for site in sites if site is not gone], [*removed, gone])
            return gone

    def _write(self, sites: list[AdmittedSite], removed: list[AdmittedSite]) -> None:
        register = {"sites": sites, "removed": removed}
        entries = {key: [site.model_dump(mode="json") for site in value] for key, value in register.items()}
        write_file(self._path, canonical_bytes(entries))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class Publication:
    """The published manifest and the blobs that it names.

    Args:
        federation: the coordinator.
    """

    def __init__(self, federation: Federation) -> None:
        self._federation = federation

    def manifest(self) -> Manifest:
        """Return what is published.

        Raises:
            Refused: E-STATE when nothing is; E-SIGNATURE or E-FORMAT when the file is not ours.
        """
        return verify_manifest(self.envelope(), self._federation.signing_key().public_key())

    def envelope(self) -> bytes:
        """Return the sealed manifest as hospitals get it.

        Raises:
            Refused: E-STATE when nothing is published.
        """
        try:
            return self._federation.manifest_path.read_bytes()
        except FileNotFoundError:
            raise Refused(
                Code.STATE,
                f"Nothing is published in {self._federation.root}.",
                "Run: central publish STATE --encoder FILE --head FILE",
            ) from None

    def blob_path(self, digest: str) -> Path:
        """Return where a published file lies. The digest must have been checked to be one."""
        return self._federation.blobs / blob_name(digest)

    def publish(self, *, encoder: Path, head: Path) -> Manifest:
        """Copy both files by digest, then sign and replace the manifest. Nothing is loaded.

        Raises:
            Refused: E-FORMAT when a file is not plain safetensors or the two do not belong together; E-STATE when one
                cannot be read.
        """
        artifacts: list[Artifact] = []
        for role, path in (("encoder", encoder), ("head", head)):
            digest, header = self._copy(path)
            artifacts.append(_describe(role, path, digest, header))
        stated = header.metadata.get("encoder")  # of the head, the last one
        if artifacts[0].preset != artifacts[1].preset:
            raise Refused(
                Code.FORMAT,
                f"{encoder.name} is of preset {artifacts[0].preset} and {head.name} of {artifacts[1].preset}.",
                "Publish an encoder and a head that were made together.",
            )
        _check_pair(artifacts[0], artifacts[1], stated)
        sequence = self.manifest().sequence + 1 if self._federation.manifest_path.exists() else 1
        manifest = Manifest(federation=self._federation.config.name, sequence=sequence, artifacts=artifacts)
        write_file(self._federation.manifest_path, seal_manifest(manifest, self._federation.signing_key()))
        return manifest

    def _copy(self, source: Path) -> tuple[str, Header]:
        """Copy a file into the blobs; what is checked and hashed is the copy, which no one else can change."""
        read_header(source)  # refuse early, before copying something large
        temporary = self._federation.blobs / f".{secrets.token_hex(8)}.tmp"
        hasher = hashlib.sha256()
        try:
            with source.open("rb") as reader, temporary.open("xb") as writer:
                while piece := reader.read(_COPY_BYTES):
                    hasher.update(piece)
                    writer.write(piece)
                writer.flush()
                os.fsync(writer.fileno())
            header = read_header(temporary, source.name)
            if header.file_bytes > MAX_ARTIFACT_BYTES:
                raise Refused(
                    Code.FORMAT,
                    f"{source.name} has {header.file_bytes} bytes; {MAX_ARTIFACT_BYTES} are allowed.",
                    "Publish a smaller model.",
                )
            digest = f"sha256:{hasher.hexdigest()}"
            os.replace(temporary, self.blob_path(digest))
            sync_folder(self._federation.blobs)
        except OSError as error:
            raise Refused(
                Code.STATE, f"{source} cannot be copied ({error.strerror}).", "Check its rights and the free space."
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
        return digest, header


def publish_files(root: Path, *, encoder: Path, head: Path) -> list[str]:
    """Publish an encoder and a head; return lines for the operator.

    Raises:
        Refused: as `Publication.publish`.
    """
    manifest = Publication(Federation.open(root)).publish(encoder=encoder, head=head)
    lines = [f"Published manifest {manifest.sequence} of {manifest.federation}."]
    for artifact in manifest.artifacts:
        lines.append(f"  {artifact.role}: {artifact.file_name}, {artifact.bytes} bytes, {artifact.digest}")
    return lines


def _describe(role: str, path: Path, digest: str, header: Header) -> Artifact:
    if header.metadata.get("role", role) != role:
        raise Refused(Code.FORMAT, f"{path.name} is not the {role}.", "Give the encoder and the head in their places.")
    values = {
        "role": role,
        "digest": digest,
        "bytes": header.file_bytes,
        "preset": _preset(header),
        "task": header.metadata.get("task") if role == "head" else None,
        "file_name": path.name,
    }
    try:
        return Artifact.model_validate(values)
    except ValidationError as error:
        key = error.errors()[0]["loc"][0]
        raise Refused(
            Code.FORMAT, f"{path.name} cannot be published: its {key} is not a plain label.", "Rename it."
        ) from None


def _check_pair(encoder: Artifact, head: Artifact, stated: str | None) -> None:
    """Refuse a head made for another encoder: hospitals would refuse it too, one by one.

    Args:
        encoder: what is to be published.
        head: what is to be published with it.
        stated: digest of the encoder file that the head's own metadata name; None where they name none, which is fine
            for a model of another make only.
    """
    if stated is None and head.preset == "custom":
        return
    if stated != encoder.digest:
        raise Refused(
            Code.FORMAT,
            f"{head.file_name} was made for {f'encoder {stated[:19]}…' if stated else 'an encoder it does not state'}, "
            f"not for {encoder.file_name} ({encoder.digest[:19]}…).",
            "Publish an encoder and a head that were made together.",
        )


def _preset(header: Header) -> str:
    """Return the name of the architecture that `sspformer` writes into a checkpoint."""
    try:
        description = parse(header.metadata["architecture"].encode(), "the architecture", max_bytes=1 << 16)
        return str(description["name"])
    except (Refused, KeyError, TypeError):
        return "custom"


def _read(site: AdmittedSite) -> x509.Certificate:
    return x509.load_pem_x509_certificate(site.certificate.encode())


def _taken(what: str) -> Refused:
    return Refused(Code.STATE, f"{what}.", "Ask the site to run `site-client init` with a name and keys of its own.")
