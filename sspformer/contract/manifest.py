"""The manifest: which encoder and which warm head a federation works with, by digest, signed by the coordinator."""

from __future__ import annotations

from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sspformer.contract.envelope import seal, verify
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import Digest

KIND = "manifest"
MAX_ARTIFACT_BYTES = 4 << 30
FederationName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
_Label = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Artifact(_Frozen):
    """One file that hospitals download."""

    role: Literal["encoder", "head"]
    digest: Digest
    bytes: int = Field(gt=0, le=MAX_ARTIFACT_BYTES)
    preset: _Label
    task: _Label | None = None
    file_name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,126}$", description="for people; never used as a path"
    )

    @property
    def blob_name(self) -> str:
        """File name under which both sides keep the bytes."""
        return blob_name(self.digest)


class Manifest(_Frozen):
    """What is published. `sequence` grows with every publication, so that an old manifest cannot come back."""

    federation: FederationName
    sequence: int = Field(ge=1)
    artifacts: list[Artifact]

    @model_validator(mode="after")
    def _one_of_each(self) -> Manifest:
        if sorted(artifact.role for artifact in self.artifacts) != ["encoder", "head"]:
            raise ValueError("a manifest names one encoder and one head")
        return self

    @property
    def encoder(self) -> Artifact:
        """The frozen encoder."""
        return self._of("encoder")

    @property
    def head(self) -> Artifact:
        """The warm head that training starts from."""
        return self._of("head")

    def _of(self, role: str) -> Artifact:
        return next(artifact for artifact in self.artifacts if artifact.role == role)


def blob_name(digest: str) -> str:
    """Turn "sha256:<hex>" into the file name "sha256-<hex>"."""
    return digest.replace(":", "-")


def seal_manifest(manifest: Manifest, key: Ed25519PrivateKey) -> bytes:
    """Sign a manifest with the coordinator's key."""
    return seal(KIND, manifest.model_dump(mode="json"), key)


def verify_manifest(envelope: bytes, coordinator: Ed25519PublicKey) -> Manifest:
    """Check a manifest's signature, then its content.

    Raises:
        Refused: E-SIGNATURE, or E-FORMAT when the bytes or the fields are not a manifest's.
    """
    payload = verify(envelope, KIND, [coordinator])
    try:
        return Manifest.model_validate(payload)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "its artifacts"
        raise Refused(
            Code.FORMAT,
            f"The signed manifest is wrong at {where}.",
            "Ask the coordinator to publish again with the same version of the software.",
        ) from None
