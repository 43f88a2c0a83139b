"""Peak memory of every process of a federation, read from the kernel while it runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

# What a command line says about a process; the first that matches names it.
_ROLES = (
    ("flower-superlink", "superlink"),
    ("flower-superexec", "superexec"),
    ("flwr-serverapp", "server app"),
    ("flwr-clientapp", "client app"),
    ("central.gateway", "gateway"),
    ("site_client.supernode", "supernode"),
    ("flower-supernode", "supernode"),
    ("site_client.worker", "worker"),
    ("tests.federation.trivial", "worker (trivial fit)"),
    ("central.cli serve", "central serve"),
    ("central.cli run", "central run"),
    ("site_client.cli start", "site-client start"),
    ("tests.federation.site", "site-client start"),
)


class Peaks:
    """The highest resident size seen of each process, by its role."""

    def __init__(self) -> None:
        self._by_process: dict[tuple[int, float], tuple[str, float]] = {}

    def look(self) -> None:
        """Read the peaks of all living descendants of this process."""
        for process in psutil.Process().children(recursive=True):
            try:
                role, key = _role(" ".join(process.cmdline())), (process.pid, process.create_time())
                with open(f"/proc/{process.pid}/status") as file:
                    peak = re.search(r"VmHWM:\s+(\d+) kB", file.read())
            except (psutil.Error, OSError):  # it ended while we looked
                continue
            if role is not None and peak is not None:
                self._by_process[key] = (role, int(peak.group(1)) / 1024)

    def by_role(self) -> dict[str, list[float]]:
        """MiB of each process, largest first."""
        roles: dict[str, list[float]] = {}
        for role, peak in sorted(self._by_process.values(), key=lambda item: -item[1]):
            roles.setdefault(role, []).append(round(peak, 1))
        return roles


@contextmanager
def watched(every_s: float = 0.5) -> Iterator[Peaks]:
    """Look at the descendants of this process again and again while the block runs."""
    peaks, over = Peaks(), threading.Event()

    def look() -> None:
        while not over.wait(every_s):
            peaks.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
        peaks.look()
    finally:
        over.set()
        thread.join()


def _role(command: str) -> str | None:
    role = next((role for sign, role in _ROLES if sign in command), None)
    # Only the stock side runs without TLS.
    return f"stock {role}" if role is not None and "--insecure" in command else role
