"""The house: who may import whom, and that each rule can fail."""

from __future__ import annotations

import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sspformer

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("central", "site_client", "sspformer")
HEAVY = ("torch", "nibabel", "nilearn", "opacus", "skimage")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the import rules over the packages in `folder`."""
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    command = [sys.executable, "-c", code, "--no-cache", "--config", str(folder / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copied_house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages in which rules may be broken."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    return folder


def test_house_keeps_its_rules(copied_house: Path) -> None:
    result = lint_imports(copied_house)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("central/store_mutant.py", "import torch"),
        ("central/store_mutant.py", "from sspformer.model import assembly"),
        ("central/store_mutant.py", "import site_client"),
        ("site_client/site_mutant.py", "import central"),
        ("site_client/site_mutant.py", "import flwr"),
        ("site_client/site_mutant.py", "import pickle"),
        ("sspformer/model/mutant.py", "import flwr"),
        ("sspformer/contract/mutant.py", "import torch"),
    ],
)
def test_broken_rule_is_caught(copied_house: Path, file: str, line: str) -> None:
    mutant = copied_house / file
    mutant.write_text(line + "\n")
    try:
        result = lint_imports(copied_house)
    finally:
        mutant.unlink()
    assert result.returncode != 0, f"{line!r} in {file} went unnoticed"
    assert "BROKEN" in result.stdout, result.stdout + result.stderr


def test_central_may_import_only_the_contract_of_sspformer() -> None:
    """The list of forbidden rooms is written out, so a new room must be added to it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["source_modules" if "source_modules" in c else "modules"] == ["central"])
    rooms = {f"sspformer.{module.name}" for module in pkgutil.iter_modules(sspformer.__path__)} - {"sspformer.contract"}
    assert rooms <= set(contract["forbidden_modules"])


def test_contract_and_central_load_no_torch() -> None:
    """Import all that the coordinator runs, in a fresh process: import-linter does not see imports at run time."""
    code = f"""
import importlib, pkgutil, sys
import central, sspformer.contract
for package in (sspformer.contract, central):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print(",".join(sorted(set({HEAVY!r}) & set(sys.modules))))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "", f"loaded on the coordinator: {result.stdout}"


def test_lock_pins_and_hashes_everything_but_torch() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    names = re.findall(r"^([a-z0-9][a-z0-9.-]*)==\S+ \\\n    --hash=sha256:[0-9a-f]{64}$", lock, flags=re.M)
    pins = [line for line in lock.splitlines() if line and not line.startswith(("#", " "))]
    assert len(names) == len(pins) > 50
    assert not [name for name in names if name == "torch" or name.startswith(("nvidia", "triton"))]
    assert "://" not in lock
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    direct = {re.split(r"[\[<>=~! ]", requirement)[0].lower() for requirement in asked} - {"sspformer-onsite", "torch"}
    assert direct <= set(names)
