"""Write requirements.lock from pip's own resolution of every extra.

Run it in a throw-away virtual environment of the Python that the lock is for:

    python .ci/lock.py

Every distribution is pinned with the sha256 of the file that pip chose. torch is left out on purpose: its wheel differs
between CPU and GPU machines, so the Makefile pins it by version alone.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Not in the lock: the project itself, torch, and what only torch's GPU wheels bring.
LEFT_OUT = ("sspformer-onsite", "torch", "triton", "nvidia-", "cuda-")
BUILD = ("setuptools", "wheel")

HEADER = """\
# Every distribution that the project, its extras and its tools need, pinned and hashed.
# Made for Python {python} on Linux x86-64 by .ci/lock.py; do not edit by hand.
#
#   pip install --require-hashes --no-deps -r requirements.lock
#   pip install torch==2.13.0
#   pip install --no-deps --no-build-isolation -e .
#
# torch is the one exception: its wheel differs between CPU and GPU machines, so no single hash fits, and pip takes
# hashes for all requirements of a file or for none. It is pinned by version in the second command instead. Everything
# that its CPU wheel needs is in this file, so that command then fetches torch alone; on a GPU machine it also brings
# that wheel's own CUDA libraries.
"""


def resolve() -> list[dict]:
    """Ask pip what it would install for all extras, without installing anything."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), f"{ROOT}[dev]", *BUILD], check=True)
        return json.loads(report.read_text())["install"]


def main() -> None:
    """Write the lock file next to pyproject.toml."""
    lines = []
    for item in resolve():
        name = item["metadata"]["name"].lower().replace("_", "-")
        if any(name == out or (out.endswith("-") and name.startswith(out)) for out in LEFT_OUT):
            continue
        sha256 = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={item['metadata']['version']} \\\n    --hash=sha256:{sha256}\n")
    header = HEADER.format(python=".".join(platform.python_version_tuple()[:2]))
    (ROOT / "requirements.lock").write_text(header + "".join(sorted(lines)))
    print(f"requirements.lock: {len(lines)} distributions")


if __name__ == "__main__":
    main()
