"""YAML settings: a refusal names file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from sspformer.contract.errors import Code, Refused
from sspformer.contract.settings import load_settings


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: float = Field(1.0, gt=0)
    names: tuple[str, ...] = ("a",)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    port: int = Field(ge=1, le=65535)
    policy: Inner = Inner()


def load(tmp_path: Path, text: str | bytes) -> Outer:
    path = tmp_path / "site.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(path, Outer)


def test_a_right_file_is_read(tmp_path):
    settings = load(tmp_path, "# comment\nname: alpha\nport: 8443\npolicy:\n  limit: 2\n  names: [b, c]\n")
    assert settings == Outer(name="alpha", port=8443, policy=Inner(limit=2.0, names=("b", "c")))


WRONG = {
    "unknown key": ("name: a\nport: 1\ncolour: red\n", 3, "colour", "not known"),
    "unknown nested key": ("name: a\nport: 1\npolicy:\n  # a comment\n  limti: 2\n", 5, "policy.limti", "not known"),
    "bad value": ("name: a\n\n\nport: 70000\n", 4, "port", "65535"),
    "bad nested value": ("name: a\nport: 1\npolicy:\n  limit: -1\n", 4, "policy.limit", "greater than 0"),
    "bad list item": ("name: a\nport: 1\npolicy:\n  names:\n  - b\n  - {x: 1}\n", 6, "policy.names.1", "string"),
    "missing key": ("name: a\n", 1, "port", "missing"),
    "not a section": ("name: a\nport: 1\npolicy: 3\n", 3, "policy", "dictionary"),
    "a key twice": ("name: a\nport: 1\nname: b\n", 3, "name", "twice"),
    "a nested key twice": ("name: a\nport: 1\npolicy:\n  limit: 1\n  limit: 99\n", 5, "limit", "twice"),
    "broken YAML": ("name: a\nport: [1\nx: 2\n", 3, "", "not YAML"),
    "a tab": ("name: a\nport: 1\npolicy:\n\tlimit: 1\n", 4, "", "not YAML"),
    "empty": ("", 1, "", "no keys"),
    "a list": ("- a\n", 1, "", "no keys"),
    "two documents": ("name: a\n---\nname: b\n", 2, "", "not YAML"),
    "a Python object": ("name: !!python/object/apply:os.system [ls]\nport: 1\n", 1, "", "plain YAML"),
    "a bad date": ("name: 2020-99-99\nport: 1\n", 1, "", "plain YAML"),
    "a list as key": ("? [x]\n: 1\n", 1, "a key", "plain word"),
    "an alias": ("name: &a a\nport: *a\n", 2, "*a", "alias"),
    "an alias of itself": ("name: &a [*a]\nport: 1\n", 1, "*a", "alias"),
    "too deep": ("name: " + "[" * 5000 + "]" * 5000 + "\n", 1, "", "deeply"),
    "not text": (b"name: \xff\n", 1, "", "UTF-8"),
    "too large": ("name: " + "a" * (1 << 20) + "\nport: 1\n", 1, "", "larger"),
}


@pytest.mark.parametrize(("text", "line", "key", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_one_refusal_that_says_where(tmp_path, text, line, key, reason):
    with pytest.raises(Refused) as refusal:
        load(tmp_path, text)
    assert refusal.value.code == Code.CONFIG
    assert f"{tmp_path / 'site.yaml'}, line {line}: " in refusal.value.what
    assert key in refusal.value.what
    assert reason in refusal.value.what


def test_a_missing_file_is_one_refusal(tmp_path):
    with pytest.raises(Refused, match="cannot be read") as refusal:
        load_settings(tmp_path / "none.yaml", Outer)
    assert refusal.value.code == Code.CONFIG
