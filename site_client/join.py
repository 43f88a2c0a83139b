"""Joining a federation: make keys here, ask, verify the answer, pin the coordinator's key."""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from site_client.config import Coordinator, SiteConfig
from site_client.folder import SiteFolder
from sspformer.contract.durable import make_private_folder, read_secret, write_file, write_secret
from sspformer.contract.envelope import MAX_BYTES
from sspformer.contract.errors import Code, Refused
from sspformer.contract.joining import Admission, Request, request_digest
from sspformer.contract.keys import fingerprint, public_pem, save_private, save_public


def create(root: Path, *, name: str, data: Path, device: str) -> list[str]:
    """Make a site's folder, its keys and its request; `site.yaml` is written last and marks the folder whole.

    Args:
        root: the site's folder.
        name: name of the site.
        data: its BIDS dataset.
        device: "cpu" or "cuda".

    Returns:
        Lines for the operator.

    Raises:
        Refused: E-CONFIG for a bad option; E-DATA when the dataset is no folder; E-STATE when the folder already holds
            a site, whole or in part, or anything else.
    """
    config = SiteConfig.make(name=name, data=data.absolute(), device=device)
    folder = SiteFolder(root, config)
    if not data.is_dir():
        raise Refused(Code.DATA, f"--data {data} is not a folder.", "Give the folder of the site's BIDS dataset.")
    if folder.config_path.exists() or folder.keys.exists():
        raise Refused(
            Code.STATE,
            f"{root} already holds a site; its keys are not overwritten.",
            "Name another folder, or move this one away if it is really no longer needed.",
        )
    try:
        if root.exists() and any(root.iterdir()):
            raise Refused(
                Code.STATE,
                f"{root} holds other files already; a site's keys and patient data do not belong among them.",
                "Name a new folder, or an empty one.",
            )
        for place in (root, folder.keys, folder.store):
            make_private_folder(place)
    except OSError as error:
        raise Refused(
            Code.STATE, f"{root} cannot be made ({error.strerror}).", "Name a folder you may write."
        ) from None
    request = _make_keys(folder)
    config.save(folder.config_path)
    return [
        f"Made site {name} in {root}; its private keys stay there.",
        f"Hand {folder.request_path} to the coordinator (it holds no secret).",
        f"Fingerprint of this site's key, to read out to the coordinator: {request}",
    ]


def accept(root: Path, admission_path: Path, *, fingerprint: str) -> list[str]:
    """Verify an admission, store the certificates, pin the coordinator's key and fill in `site.yaml`.

    Args:
        root: the site's folder.
        admission_path: what the coordinator handed back.
        fingerprint: the coordinator's, learnt by another way than the admission.

    Returns:
        Lines for the operator.

    Raises:
        Refused: E-SIGNATURE when the admission is not that coordinator's or answers another request; E-FORMAT; E-STATE.
    """
    folder = SiteFolder.open(root)
    try:
        with admission_path.open("rb") as file:
            envelope = file.read(MAX_BYTES + 1)
        request = folder.request_path.read_bytes()
    except OSError as error:
        raise Refused(
            Code.STATE,
            f"{error.filename} cannot be read ({error.strerror}).",
            "Give the file that `central admit` wrote, and keep request.json in the site's folder.",
        ) from None
    admission, key = Admission.verify(envelope, fingerprint)
    if folder.coordinator_key_path.exists() and folder.coordinator_key().public_bytes_raw() != key.public_bytes_raw():
        raise Refused(
            Code.SIGNATURE,
            f"{root} has already joined a federation whose key is another one.",
            "Make a new site folder for another federation.",
        )
    if admission.request_digest != request_digest(request) or admission.site != folder.config.name:
        raise Refused(
            Code.SIGNATURE,
            f"The admission is for site {admission.site}'s request, not for the one in {folder.request_path}.",
            "Ask the coordinator for the admission that answers this request.",
        )
    _check_certificates(folder, admission)
    write_file(folder.ca_certificate_path, admission.ca_certificate.encode())
    write_file(folder.tls_certificate_path, admission.site_certificate.encode())
    save_public(folder.coordinator_key_path, key)
    coordinator = Coordinator(
        federation=admission.federation,
        host=admission.host,
        gateway_port=admission.gateway_port,
        superlink_port=admission.superlink_port,
    )
    folder.config.model_copy(update={"coordinator": coordinator}).save(folder.config_path)
    return [
        f"Site {admission.site} has joined {admission.federation} at {admission.host} port {admission.gateway_port}.",
        f"Next: site-client fetch {root}",
    ]


def _make_keys(folder: SiteFolder) -> str:
    """Make and write all keys and the sealed request; return the fingerprint of the signing key."""
    signing = Ed25519PrivateKey.generate()
    tls = ec.generate_private_key(ec.SECP256R1())
    node = ec.generate_private_key(ec.SECP384R1())
    save_private(folder.signing_key_path, signing)
    write_secret(folder.tls_key_path, _private_bytes(tls, serialization.PrivateFormat.PKCS8))
    write_secret(folder.node_key_path, _private_bytes(node, serialization.PrivateFormat.OpenSSH))
    write_secret(folder.superexec_secret_path, secrets.token_hex(32).encode())
    node_public = node.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_file(folder.node_public_key_path, node_public + b"\n")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.config.name)])
    tls_request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(tls, hashes.SHA256())
    request = Request(
        name=folder.config.name,
        tls_request=tls_request.public_bytes(serialization.Encoding.PEM).decode(),
        node_public_key=node_public.decode(),
        signing_public_key=public_pem(signing.public_key()),
    )
    write_file(folder.request_path, request.seal(signing))
    return fingerprint(signing.public_key())


def _private_bytes(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _check_certificates(folder: SiteFolder, admission: Admission) -> None:
    """The coordinator's signature says who sent the certificates; this says that they fit this site and each other."""
    tls_pem = read_secret(folder.tls_key_path, "the TLS key")
    now = datetime.datetime.now(datetime.UTC)
    try:
        authority = x509.load_pem_x509_certificate(admission.ca_certificate.encode())
        own = x509.load_pem_x509_certificate(admission.site_certificate.encode())
        own.verify_directly_issued_by(authority)
        fits = own.public_key() == serialization.load_pem_private_key(tls_pem, password=None).public_key()
        valid = own.not_valid_before_utc <= now < own.not_valid_after_utc
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        fits = valid = False
    if not fits:
        raise Refused(
            Code.SIGNATURE,
            "The admission's certificate is not for this site's key.",
            "Ask the coordinator for the admission that answers this site's request.",
        )
    if not valid:
        raise Refused(
            Code.STATE,
            f"The admission's certificate is valid from {own.not_valid_before_utc:%Y-%m-%d} to "
            f"{own.not_valid_after_utc:%Y-%m-%d}, which is not now.",
            "Check this machine's clock; then ask the coordinator.",
        )
