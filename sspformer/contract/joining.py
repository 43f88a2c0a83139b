"""What a hospital and the coordinator hand each other once, when the hospital joins."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sspformer.contract.canonical import digest
from sspformer.contract.envelope import read_unverified, seal, verify
from sspformer.contract.errors import Code, Refused
from sspformer.contract.keys import parse_public, public_pem, same_fingerprint
from sspformer.contract.manifest import FederationName
from sspformer.contract.plan import Digest

SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Pem = Annotated[str, Field(min_length=1, max_length=16_384)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Request(_Frozen):
    """A hospital's request: its name and the public halves of its keys. Sealed by its own signing key."""

    name: SiteName
    tls_request: Pem = Field(description="PKCS 10 certificate request; of its content only the public key is used")
    node_public_key: str = Field(max_length=1024, description="OpenSSH, ECDSA P-384: how Flower knows the node")
    signing_public_key: Pem = Field(description="Ed25519, PEM")

    def seal(self, key: Ed25519PrivateKey) -> bytes:
        """Sign the request, which proves that the site holds the signing key that it names."""
        return seal("request", self.model_dump(mode="json"), key)

    @classmethod
    def verify(cls, envelope: bytes) -> Request:
        """Check a request against the key that it brings.

        Raises:
            Refused: E-FORMAT, or E-SIGNATURE when the sender does not hold the key.
        """
        claimed = _validate(cls, read_unverified(envelope, "request"), "request")
        payload = verify(envelope, "request", [parse_public(claimed.signing_public_key)])
        return _validate(cls, payload, "request")


class Admission(_Frozen):
    """The coordinator's answer. Sealed by its signing key, whose fingerprint the hospital got by another way."""

    federation: FederationName
    site: SiteName
    host: Host
    gateway_port: Port
    superlink_port: Port
    ca_certificate: Pem
    site_certificate: Pem
    coordinator_public_key: Pem
    request_digest: Digest = Field(description="of the sealed request that this answers")
    protocol: Literal[1] = 1

    def seal(self, key: Ed25519PrivateKey) -> bytes:
        """Sign the admission with the coordinator's key."""
        return seal("admission", self.model_dump(mode="json"), key)

    @classmethod
    def verify(cls, envelope: bytes, fingerprint: str) -> tuple[Admission, Ed25519PublicKey]:
        """Check an admission against the coordinator's fingerprint.

        Returns:
            The admission, and the coordinator's key to pin.

        Raises:
            Refused: E-FORMAT, or E-SIGNATURE when the fingerprint is another key's.
        """
        claimed = _validate(cls, read_unverified(envelope, "admission"), "admission")
        key = parse_public(claimed.coordinator_public_key)
        if not same_fingerprint(key, fingerprint):
            raise Refused(
                Code.SIGNATURE,
                "The admission is signed by a key with another fingerprint than the one given.",
                "Ask the coordinator, by phone, to read out the fingerprint that `central init` printed.",
            )
        return _validate(cls, verify(envelope, "admission", [key]), "admission"), key


def request_digest(envelope: bytes) -> str:
    """Return the digest by which an admission names the request that it answers."""
    return digest(envelope)


def node_key(text: str) -> str:
    """Return a Flower node key in its one spelling: OpenSSH, without a comment.

    Raises:
        Refused: E-FORMAT when it is not an ECDSA P-384 public key.
    """
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise Refused(
            Code.FORMAT,
            "The request's node key is not an ECDSA P-384 public key.",
            "Ask the site to run `site-client init` again.",
        )
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def signing_key_pem(pem: str) -> str:
    """Return a signing key in its one spelling.

    Raises:
        Refused: E-FORMAT when it is not an Ed25519 public key.
    """
    return public_pem(parse_public(pem))


_Model = TypeVar("_Model", Request, Admission)


def _validate(model: type[_Model], payload: object, kind: str) -> _Model:
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise Refused(
            Code.FORMAT, f"The {kind} is wrong at '{where}'.", "Ask its sender to make it again with the same version."
        ) from None
