"""site.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from site_client.config import Coordinator, SiteConfig
from site_client.folder import SiteFolder
from site_client.policy import Policy
from sspformer.contract.errors import Code, Refused

COORDINATOR = Coordinator(federation="demo", host="localhost", gateway_port=8443, superlink_port=8444)


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    SiteConfig(name="alpha", data=Path("/data/bids"), coordinator=COORDINATOR).save(path)
    return path


def test_a_configuration_reads_back(tmp_path):
    config = SiteConfig.load(saved(tmp_path))
    assert config == SiteConfig(name="alpha", data=Path("/data/bids"), coordinator=COORDINATOR)
    assert config.policy == Policy()


def test_every_limit_is_spelt_out_for_the_operator(tmp_path):
    text = saved(tmp_path).read_text()
    assert all(f"  {key}:" in text for key in Policy.model_fields)


WRONG = {
    "misspelt limit": ("max_rounds", "max_ruonds", "policy.max_ruonds", "not known"),
    "limit out of range": ("max_rounds: 100", "max_rounds: 0", "policy.max_rounds", "greater than or equal to 1"),
    "not a number": ("delta: 1.0e-05", "delta: .nan", "policy.delta", ""),
    "device": ("device: cpu", "device: tpu", "device", "'cpu' or 'cuda'"),
    "port": ("gateway_port: 8443", "gateway_port: 99999", "coordinator.gateway_port", "65535"),
    "threads": ("threads: 1", "threads: many", "threads", "integer"),
}


@pytest.mark.parametrize(("old", "new", "key", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_line_is_named(tmp_path, old, new, key, reason):
    path = saved(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if new in text)
    with pytest.raises(Refused) as refusal:
        SiteConfig.load(path)
    assert refusal.value.code == Code.CONFIG
    assert f"{path}, line {line}: key '{key}'" in refusal.value.what
    assert reason in refusal.value.what


def test_data_may_be_relative_to_the_folder(tmp_path):
    for data, meant in (("bids", tmp_path / "bids"), ("/srv/bids", Path("/srv/bids"))):
        SiteConfig.make(name="alpha", data=Path(data), device="cpu").save(tmp_path / "site.yaml")
        assert SiteFolder.open(tmp_path).data == meant


def test_a_site_that_has_not_joined_says_how(tmp_path):
    SiteConfig.make(name="alpha", data=Path("bids"), device="cpu").save(tmp_path / "site.yaml")
    folder = SiteFolder.open(tmp_path)
    with pytest.raises(Refused, match="not joined") as refusal:
        folder.coordinator()
    assert "site-client accept" in refusal.value.next_step
    with pytest.raises(Refused, match="cannot be read"):
        folder.coordinator_key()


def test_a_file_cut_short_does_not_loosen_a_limit(tmp_path: Path) -> None:
    """The end of the file is lost: the hospital's own cap must not become the default one."""
    path = saved(tmp_path)
    whole = path.read_text().replace("max_epsilon: 8.0", "max_epsilon: 1.0")
    assert "max_epsilon: 1.0" in whole
    path.write_text(whole)
    assert SiteConfig.load(path).policy.max_epsilon == 1.0
    for end in (whole.index("  max_epsilon"), whole.index("policy:")):
        path.write_text(whole[:end])
        with pytest.raises(Refused, match=r"'policy\.\w+' is missing") as refusal:
            SiteConfig.load(path)
        assert refusal.value.code is Code.CONFIG
