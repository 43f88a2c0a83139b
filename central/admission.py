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
from sspformer.contract.keys import fingerprint as key_fingerprint
from sspformer.contract.keys import parse_public, public_pem, same_fingerprint


def admit(federation: Federation, envelope: bytes, fingerprint: str) -> tuple[Admission, bytes]:
    """Admit the sender of a request. The same request again gives the same certificate.

    Args:
        federation: the coordinator.
        envelope: the hospital's sealed request. Anyone can make one in any name, and it may have been exchanged on
            its way.
        fingerprint: of the hospital's key, as the hospital read it out: what says whose request this is.

    Returns:
        The admission, and the same sealed, to hand to the hospital.

    Raises:
        Refused: E-FORMAT or E-SIGNATURE for a bad request or one of another key than the fingerprint's; E-STATE when
            its name or a key is another site's, or a key is that of a removed site. Nothing is issued then.
    """
    request = Request.verify(envelope)
    if not same_fingerprint(parse_public(request.signing_public_key), fingerprint):
        raise Refused(
            Code.SIGNATURE,
            f"The request in the name of {request.name} is of a key with another fingerprint than the one given.",
            "Ask the hospital, by phone, to read out the fingerprint that `site-client init` printed.",
        )
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


def admit_file(root: Path, request_path: Path, output: Path | None, *, fingerprint: str) -> list[str]:
    """Admit the hospital whose request lies in a file; write the admission beside it or where told.

    Args:
        root: the coordinator's folder.
        request_path: the request.
        output: where the admission goes; beside the request if None.
        fingerprint: of the hospital's key, as the hospital read it out.

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
    admission, sealed = admit(federation, envelope, fingerprint)
    output = output or request_path.with_name("admission.json")
    try:
        write_file(output, sealed)
    except OSError as error:
        raise Refused(
            Code.STATE, f"The admission {output} cannot be written ({error.strerror}).", "Name another place with -o."
        ) from None
    own_print = key_fingerprint(parse_public(admission.coordinator_public_key))
    return [
        f"Admitted {admission.site}: its key has the fingerprint given.",
        f"Wrote {output}. At the site: site-client accept SITE {output.name} --fingerprint {own_print}",
    ]


def remove_site(root: Path, name: str) -> list[str]:
    """Take a site out of the register.

    Everyone who decides by the register sees it at once: the gateway refuses the site's next call, a running round
    asks it no more, and `central serve`, if it runs, has the SuperLink forget its node.

    Returns:
        Lines for the operator.

    Raises:
        Refused: E-CONFIG or E-STATE; E-STATE when no such site is admitted.
    """
    SiteRegistry(Federation.open(root).sites_path).remove(name)
    return [
        f"Removed {name}: the gateway refuses its next call, and no round asks it any more.",
        "Its keys are not admitted again; to come back it makes a new folder with `site-client init`.",
    ]
