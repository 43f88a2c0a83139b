"""A request that was exchanged on its way, and a site that was removed."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from central import admission as admission_module
from central.admission import admit_file, remove_site
from central.cli import app as central
from central.federation import Federation
from central.registry import SiteRegistry
from site_client.join import create as create_site
from sspformer.contract import gateway_pb2
from sspformer.contract.errors import Code, Refused
from tests.trust import MIB, admit_request_file, client, join, make_federation, print_in, publish, serving


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return make_federation(tmp_path / "federation")


def request_of(folder: Path, name: str = "alpha") -> Path:
    data = folder.parent / "bids"
    data.mkdir(exist_ok=True)
    create_site(folder, name=name, data=data, device="cpu")
    return folder / "request.json"


def exchanged(tmp_path: Path) -> tuple[Path, str]:
    """What a thief put in place of alpha's request, and the fingerprint that alpha reads out."""
    (tmp_path / "there").mkdir()
    honest, thief = request_of(tmp_path / "here"), request_of(tmp_path / "there" / "site")
    return thief, print_in(honest.read_bytes())


def test_a_request_in_the_name_of_a_site_but_of_another_key_is_refused(federation: Federation, tmp_path: Path) -> None:
    thief, spoken = exchanged(tmp_path)
    with pytest.raises(Refused) as refusal:
        admit_file(federation.root, thief, tmp_path / "admission.json", fingerprint=spoken)
    assert refusal.value.code is Code.SIGNATURE
    assert not (tmp_path / "admission.json").exists()
    assert not federation.sites_path.exists()


def test_mutant_without_the_fingerprint_admits_the_thief(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thief, spoken = exchanged(tmp_path)
    monkeypatch.setattr(admission_module, "same_fingerprint", lambda *_: True)
    admit_file(federation.root, thief, tmp_path / "admission.json", fingerprint=spoken)
    assert [site.name for site in SiteRegistry(federation.sites_path).sites()] == ["alpha"]


@pytest.mark.parametrize("spoken", ["", "00", "0" * 32])
def test_a_short_or_empty_fingerprint_admits_nobody(federation: Federation, tmp_path: Path, spoken: str) -> None:
    request = request_of(tmp_path / "alpha")
    with pytest.raises(Refused) as refusal:
        admit_file(federation.root, request, None, fingerprint=spoken)
    assert refusal.value.code is Code.SIGNATURE
    with pytest.raises(Refused):
        admit_file(federation.root, request, None, fingerprint=print_in(request.read_bytes())[:16])
    assert not federation.sites_path.exists()


def test_no_site_is_admitted_without_a_fingerprint(federation: Federation, tmp_path: Path) -> None:
    request = request_of(tmp_path / "alpha")
    done = CliRunner().invoke(central, ["admit", str(federation.root), str(request)])
    assert done.exit_code == 2
    assert not federation.sites_path.exists()


def test_a_removed_site_is_refused_at_its_next_call(federation: Federation, tmp_path: Path) -> None:
    publish(federation, tmp_path / "models", size=MIB)
    alpha, bravo = join(federation, tmp_path / "alpha"), join(federation, tmp_path / "bravo", "bravo")
    with serving(federation) as port, client(alpha, port) as gone, client(bravo, port) as staying:
        assert gone.fetch_manifest()[0].sequence == 1
        done = CliRunner().invoke(central, ["remove", str(federation.root), "alpha"])
        assert done.exit_code == 0, done.output
        with pytest.raises(grpc.RpcError) as error:  # on the connection that is open already
            gone._stub.FetchManifest(gateway_pb2.ManifestRequest())
        assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert staying.fetch_manifest()[0].sequence == 1


def test_the_keys_of_a_removed_site_are_not_admitted_again(federation: Federation, tmp_path: Path) -> None:
    join(federation, tmp_path / "alpha")
    request = tmp_path / "alpha" / "request.json"
    remove_site(federation.root, "alpha")
    with pytest.raises(Refused, match="was removed") as refusal:
        admit_request_file(federation.root, request)
    assert refusal.value.code is Code.STATE
    assert SiteRegistry(federation.sites_path).sites() == []
    # The name is free: the hospital comes back with a new folder, hence new keys.
    (tmp_path / "new").mkdir()
    admit_request_file(federation.root, request_of(tmp_path / "new" / "alpha"))
    assert [site.name for site in SiteRegistry(federation.sites_path).sites()] == ["alpha"]


def test_removing_a_site_that_is_not_there_is_refused(federation: Federation, tmp_path: Path) -> None:
    join(federation, tmp_path / "alpha")
    with pytest.raises(Refused, match="No site bravo"):
        remove_site(federation.root, "bravo")
    assert [site.name for site in SiteRegistry(federation.sites_path).sites()] == ["alpha"]
