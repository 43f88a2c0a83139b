"""`site-client start` with the trivial worker: `python -m tests.federation.site SITE`."""

from __future__ import annotations

import sys
from pathlib import Path

from site_client.start import start

if __name__ == "__main__":
    start(Path(sys.argv[1]), worker=("-m", "tests.federation.trivial"))
