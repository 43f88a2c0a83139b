"""Joining: keys made here, in the forms that Flower reads; admissions verified before anything is kept."""

from __future__ import annotations

import argparse
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from central.federation import Federation
from site_client import join as join_module
from site_client.folder import SiteFolder
from site_client.join import accept, create
from sspformer.contract import joining
from sspformer.contract.errors import Code, Refused
from sspformer.contract.joining import Admission
from sspformer.contract.keys import fingerprint, load_public, public_pem
from tests.trust import admit_request as admit
from tests.trust import admit_request_file as admit_file
from tests.trust import make_federation


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return make_federation(tmp_path / "federation")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return new_site(tmp_path, "alpha")


def new_site(tmp_path: Path, name: str) -> Path:
    (tmp_path / "bids").mkdir(exist_ok=True)
    create(tmp_path / name, name=name, data=tmp_path / "bids", device="cpu")
    return tmp_path / name


def print_of(federation: Federation) -> str:
    return fingerprint(federation.signing_key().public_key())


def admitted(federation: Federation, site: Path) -> Path:
    admit_file(federation.root, site / "request.json", site / "admission.json")
    return site / "admission.json"


def keys_of(site: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (site / "keys").iterdir()}


def test_private_keys_are_secret(site):
    folder = SiteFolder.open(site)
    assert stat.S_IMODE(folder.keys.stat().st_mode) == 0o700
    for path in (folder.tls_key_path, folder.node_key_path, folder.signing_key_path, folder.superexec_secret_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_the_node_key_is_what_flower_reads(site):
    """Both halves go through Flower's own readers."""
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    folder = SiteFolder.open(site)
    arguments = argparse.Namespace(auth_supernode_private_key=str(folder.node_key_path), auth_supernode_public_key=None)
    private, public = _try_setup_client_authentication(arguments)
    assert isinstance(private.curve, ec.SECP384R1)
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    assert try_load_public_key(folder.node_public_key_path) == public_key_to_bytes(public)


def test_init_refuses_to_overwrite(site, tmp_path):
    before = keys_of(site)
    with pytest.raises(Refused, match="not overwritten") as refusal:
        create(site, name="alpha", data=tmp_path / "bids", device="cpu")
    assert refusal.value.code == Code.STATE
    assert keys_of(site) == before


def test_init_leaves_a_folder_that_people_share_as_it_is(tmp_path):
    shared = tmp_path / "shared"
    (shared / "bids").mkdir(parents=True)
    shared.chmod(0o775)
    with pytest.raises(Refused, match="other files") as refusal:
        create(shared, name="alpha", data=shared / "bids", device="cpu")
    assert refusal.value.code == Code.STATE
    assert [path.name for path in shared.iterdir()] == ["bids"]
    create(shared / "site", name="alpha", data=shared / "bids", device="cpu")
    assert stat.S_IMODE((shared / "site").stat().st_mode) == 0o700
    empty = tmp_path / "empty"
    empty.mkdir()
    empty.chmod(0o775)
    create(empty, name="alpha", data=shared / "bids", device="cpu")
    assert stat.S_IMODE(shared.stat().st_mode) == stat.S_IMODE(empty.stat().st_mode) == 0o775
    assert stat.S_IMODE((empty / "keys").stat().st_mode) == 0o700


BAD = {
    "name": ({"name": "St. Mary"}, Code.CONFIG, "--name"),
    "device": ({"device": "tpu"}, Code.CONFIG, "--device"),
    "data": ({"data": Path("/nonexistent/bids")}, Code.DATA, "--data"),
}


@pytest.mark.parametrize(("change", "code", "word"), BAD.values(), ids=BAD.keys())
def test_init_refuses_bad_options_and_makes_nothing(tmp_path, change, code, word):
    (tmp_path / "bids").mkdir()
    options = {"name": "alpha", "data": tmp_path / "bids", "device": "cpu"} | change
    with pytest.raises(Refused, match=word) as refusal:
        create(tmp_path / "site", **options)
    assert refusal.value.code == code
    assert not (tmp_path / "site").exists()


def test_accept_pins_the_key_and_fills_in_the_configuration(federation, site):
    own_policy = "max_rounds: 100"
    (site / "site.yaml").write_text((site / "site.yaml").read_text().replace(own_policy, "max_rounds: 7"))
    lines = accept(site, admitted(federation, site), fingerprint=print_of(federation))
    folder = SiteFolder.open(site)
    assert folder.config.policy.max_rounds == 7  # the hospital's limits stay the hospital's
    assert folder.coordinator().gateway_port == federation.config.gateway_port
    assert folder.coordinator().federation == "demo"
    assert fingerprint(load_public(folder.coordinator_key_path)) == print_of(federation)
    certificate = x509.load_pem_x509_certificate(folder.tls_certificate_path.read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(folder.ca_certificate_path.read_bytes()))
    assert "joined demo" in lines[0]


def test_accept_takes_a_fingerprint_as_people_write_it(federation, site):
    digits = print_of(federation)
    spoken = ":".join(digits[i : i + 2] for i in range(0, 32, 2)).upper()
    accept(site, admitted(federation, site), fingerprint=spoken)
    accept(site, site / "admission.json", fingerprint=digits)  # once more does no harm


def refuses(site: Path, admission: Path, print_: str, code: Code) -> None:
    """Expect a refusal, and that nothing was kept."""
    before, config = keys_of(site), (site / "site.yaml").read_bytes()
    with pytest.raises(Refused) as refusal:
        accept(site, admission, fingerprint=print_)
    assert refusal.value.code == code
    assert keys_of(site) == before
    assert (site / "site.yaml").read_bytes() == config


def test_another_coordinators_admission_is_refused(federation, site, tmp_path):
    other = make_federation(tmp_path / "other")
    refuses(site, admitted(other, site), print_of(federation), Code.SIGNATURE)


def test_it_passes_without_the_fingerprint_check(federation, site, tmp_path, monkeypatch):
    other = make_federation(tmp_path / "other")
    monkeypatch.setattr(joining, "same_fingerprint", lambda *_: True)
    accept(site, admitted(other, site), fingerprint=print_of(federation))
    assert fingerprint(load_public(site / "keys" / "coordinator.pub")) == print_of(other)


@pytest.mark.parametrize("print_", ["", "00", "0" * 32])
def test_a_wrong_or_short_fingerprint_is_refused(federation, site, print_):
    refuses(site, admitted(federation, site), print_, Code.SIGNATURE)
    refuses(site, admitted(federation, site), print_of(federation)[:16], Code.SIGNATURE)


def test_an_admission_that_names_the_coordinators_key_but_is_signed_by_another_is_refused(federation, site):
    admission, _sealed = admit(federation, (site / "request.json").read_bytes())
    forged = site / "forged.json"
    forged.write_bytes(admission.model_copy(update={"host": "evil.example.org"}).seal(Ed25519PrivateKey.generate()))
    refuses(site, forged, print_of(federation), Code.SIGNATURE)


def test_another_sites_admission_is_refused(federation, site, tmp_path):
    refuses(site, admitted(federation, new_site(tmp_path, "beta")), print_of(federation), Code.SIGNATURE)


def sealed_with(federation: Federation, site: Path, **changes: object) -> Path:
    """The site's admission with some fields changed, properly sealed: a coordinator that errs or means ill."""
    admission, _sealed = admit(federation, (site / "request.json").read_bytes())
    path = site / "changed.json"
    changed = Admission.model_construct(**admission.model_dump() | changes)
    path.write_bytes(changed.seal(federation.signing_key()))
    return path


def test_a_certificate_for_another_key_is_refused(federation, site, tmp_path):
    other, _sealed = admit(federation, (new_site(tmp_path, "beta") / "request.json").read_bytes())
    path = sealed_with(federation, site, site_certificate=other.site_certificate)
    refuses(site, path, print_of(federation), Code.SIGNATURE)


def test_a_certificate_of_another_authority_is_refused(federation, site, tmp_path):
    other = make_federation(tmp_path / "other")
    path = sealed_with(federation, site, ca_certificate=other.ca_certificate_path.read_text())
    refuses(site, path, print_of(federation), Code.SIGNATURE)


def test_they_pass_without_the_certificate_check(federation, site, tmp_path, monkeypatch):
    other = make_federation(tmp_path / "other")
    monkeypatch.setattr(join_module, "_check_certificates", lambda *_: None)
    path = sealed_with(federation, site, ca_certificate=other.ca_certificate_path.read_text())
    accept(site, path, fingerprint=print_of(federation))
    assert (site / "keys" / "ca.pem").read_text() == other.ca_certificate_path.read_text()


@pytest.mark.parametrize(
    "change",
    [{"host": "a b"}, {"gateway_port": 0}, {"federation": "../x"}, {"protocol": 2}, {"extra": 1}],
    ids=["host", "port", "name", "protocol", "unknown"],
)
def test_a_signed_but_wrong_admission_is_refused(federation, site, change):
    import json

    from sspformer.contract.envelope import seal

    payload = json.loads(admitted(federation, site).read_bytes())["payload"] | change
    path = site / "changed.json"
    path.write_bytes(seal("admission", payload, federation.signing_key()))
    refuses(site, path, print_of(federation), Code.FORMAT)


def test_a_second_federation_needs_a_second_folder(federation, site, tmp_path):
    accept(site, admitted(federation, site), fingerprint=print_of(federation))
    other = make_federation(tmp_path / "other")
    refuses(site, admitted(other, site), print_of(other), Code.SIGNATURE)


def test_a_missing_admission_is_one_refusal(federation, site):
    refuses(site, site / "none.json", print_of(federation), Code.STATE)


def test_the_whole_way_by_the_commands(tmp_path):
    """init, admit, accept as typed by the two operators, with what each prints carried to the other."""
    from central.cli import app as central
    from site_client.cli import app as site_client

    (tmp_path / "bids").mkdir()
    run = CliRunner().invoke
    state, site = str(tmp_path / "state"), str(tmp_path / "site")
    made = run(central, ["init", state, "--name", "demo", "--host", "localhost"])
    asked = run(site_client, ["init", site, "--name", "alpha", "--data", str(tmp_path / "bids")])
    told = next(line for line in made.output.splitlines() if "Fingerprint" in line).split()[-1]
    seen = next(line for line in asked.output.splitlines() if "Fingerprint" in line).split()[-1]
    answer = str(tmp_path / "admission.json")
    let_in = run(central, ["admit", state, f"{site}/request.json", "--fingerprint", seen, "-o", answer])
    assert let_in.exit_code == 0
    joined = run(site_client, ["accept", site, answer, "--fingerprint", told])
    assert joined.exit_code == 0
    assert "joined demo" in joined.output
    assert public_pem(load_public(Path(site) / "keys" / "coordinator.pub"))
