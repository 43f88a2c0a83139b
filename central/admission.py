"""Admitting a hospital: check its request, issue its certificate, register it, seal the answer."""

from __future__ import annotations

import datetime
from pathlib import Path

from central.authority import certificate_pem, request_public_key
from central.federation import Federation
from central.registry import AdmittedSite, SiteRegistry
from sspformer.contract.durable import write_file
from sspformer.contract.envelope import MAX_BYTES
from sspformer.contract.errors import Code, Refused
from sspformer.contract.joining import Admission, Request, node_key, request_digest, signing_key_pem
from sspformer.contract.keys import fingerprint, parse_public, public_pem


def admit(federation: Federation, envelope: bytes) -> tuple[Admission, bytes]:
    """Admit the sender of a request. The same request again gives the same certificate.

    Args:
        federation: the coordinator.
        envelope: the hospital's sealed request.

    Returns:
        The admission, and the same sealed, to hand to the hospital.

    Raises:
        Refused: E-FORMAT or E-SIGNATURE for a bad request; E-STATE when its name or a key is another site's.
    """
    request = Request.verify(envelope)
    public = request_public_key(request.tls_request)
    authority = federation.authority()
    certificate = authority.issue_site(public, request.name, federation.config.name)
    site = SiteRegistry(federation.sites_path).admit(
        AdmittedSite(
            name=request.name,
            serial=f"{certificate.serial_number:x}",
            certificate=certificate_pem(certificate).decode(),
            node_public_key=node_key(request.node_public_key),
            signing_public_key=signing_key_pem(request.signing_public_key),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
    )
    key = federation.signing_key()
    admission = Admission(
        federation=federation.config.name,
        site=site.name,
        host=federation.config.host,
        gateway_port=federation.config.gateway_port,
        superlink_port=federation.config.superlink_port,
        ca_certificate=certificate_pem(authority.certificate).decode(),
        site_certificate=site.certificate,
        coordinator_public_key=public_pem(key.public_key()),
        request_digest=request_digest(envelope),
    )
    return admission, admission.seal(key)


def admit_file(root: Path, request_path: Path, output: Path | None) -> list[str]:
    """Admit the hospital whose request lies in a file; write the admission beside it or where told.

    Returns:
        Lines for the operator.

    Raises:
        Refused: as `admit`; E-STATE when a file cannot be read or written.
    """
    federation = Federation.open(root)
    try:
        with request_path.open("rb") as file:
            envelope = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Refused(
            Code.STATE,
            f"The request {request_path} cannot be read ({error.strerror}).",
            "Give the request.json that `site-client init` wrote.",
        ) from None
    admission, sealed = admit(federation, envelope)
    output = output or request_path.with_name("admission.json")
    try:
        write_file(output, sealed)
    except OSError as error:
        raise Refused(
            Code.STATE, f"The admission {output} cannot be written ({error.strerror}).", "Name another place with -o."
        ) from None
    site_print = fingerprint(parse_public(Request.verify(envelope).signing_public_key))
    own_print = fingerprint(parse_public(admission.coordinator_public_key))
    return [
        f"Admitted {admission.site}; fingerprint of its key, to compare with the site's: {site_print}",
        f"Wrote {output}. At the site: site-client accept SITE {output.name} --fingerprint {own_print}",
    ]
