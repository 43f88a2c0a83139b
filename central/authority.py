"""The federation's own certificate authority. Names in a certificate come from here, never from a request."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sspformer.contract.durable import read_secret, write_file, write_secret
from sspformer.contract.errors import Code, Refused

CA_DAYS = 3650
SERVER_DAYS = 825
SITE_DAYS = 365
_CLOCK_SKEW = datetime.timedelta(minutes=10)


class Authority:
    """Issues the server's and the hospitals' certificates.

    Args:
        key: the authority's private key (ECDSA P-256).
        certificate: its self-signed certificate.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate

    @classmethod
    def create(cls, federation: str) -> Authority:
        """Make a new authority for a federation."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"{federation} authority", "authority", federation)
        builder = _builder(name, name, key.public_key(), CA_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        return cls(key, builder.sign(key, hashes.SHA256()))

    @classmethod
    def load(cls, key_path: Path, certificate_path: Path) -> Authority:
        """Read an authority from its two files.

        Raises:
            Refused: E-STATE when they are missing, open to other users, or damaged.
        """
        pem = read_secret(key_path, "the authority's key")
        try:
            key = serialization.load_pem_private_key(pem, password=None)
            certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        except (ValueError, TypeError, UnsupportedAlgorithm, OSError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise Refused(
                Code.STATE,
                f"{key_path} and {certificate_path} are not this federation's authority.",
                "Restore both from the backup of this folder.",
            )
        return cls(key, certificate)

    def save(self, key_path: Path, certificate_path: Path) -> None:
        """Write the authority's key (0600) and certificate."""
        write_secret(key_path, key_pem(self._key))
        write_file(certificate_path, certificate_pem(self.certificate))

    def issue_server(
        self, public: ec.EllipticCurvePublicKey, host: str, federation: str, *more: str
    ) -> x509.Certificate:
        """Issue the coordinator's certificate, valid for its host, for loopback and for `more` names or addresses."""
        names: list[x509.GeneralName] = []
        for name in map(general_name, ("localhost", "127.0.0.1", host, *more)):
            if name not in names:
                names.append(name)
        builder = self._leaf(_name(host[:64], "coordinator", federation), public, SERVER_DAYS)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def issue_site(self, public: ec.EllipticCurvePublicKey, site: str, federation: str) -> x509.Certificate:
        """Issue a hospital's certificate: good for a client only, so that no hospital can pose as the coordinator."""
        builder = self._leaf(_name(site, "site", federation), public, SITE_DAYS)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        return builder.sign(self._key, hashes.SHA256())

    def _leaf(self, name: x509.Name, public: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
        builder = _builder(name, self.certificate.subject, public, days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        own = self._key.public_key()
        return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own), critical=False)


def general_name(host: str) -> x509.GeneralName:
    """Return a DNS name or an IP address as a certificate holds it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def request_public_key(pem: str) -> ec.EllipticCurvePublicKey:
    """Return the public key of a certificate request, after checking that the requester holds its private half.

    Everything else in the request, its subject and extensions above all, is ignored.

    Raises:
        Refused: E-FORMAT.
    """
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        valid, key = request.is_signature_valid, request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        valid, key = False, None
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Refused(
            Code.FORMAT,
            "The request's TLS part is not a certificate request with an ECDSA P-256 key.",
            "Ask the site to run `site-client init` again.",
        )
    return key


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM (PKCS 8)."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _name(common: str, unit: str, organization: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
