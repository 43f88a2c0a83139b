"""A site's own learning curve: ``history/<run>.jsonl``, one line per scored round. It never leaves the site."""

from __future__ import annotations

import json
import os
from pathlib import Path

from sspformer.contract.durable import SECRET_MODE, make_private_folder


def append(path: Path, entry: dict[str, float | int]) -> None:
    """Add one line, durably and in one write. A line that a crash tore is ended first, so that it harms no other."""
    make_private_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, SECRET_MODE)
    try:
        size = os.fstat(descriptor).st_size
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" * is_torn + json.dumps(entry).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
