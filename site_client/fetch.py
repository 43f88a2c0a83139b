"""`site-client fetch`: everything that the manifest names, with a bar for a person who watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from site_client.folder import SiteFolder
from site_client.gateway_client import GatewayClient, Progress
from sspformer.contract.durable import write_file


def fetch_published(root: Path) -> list[str]:
    """Fetch and verify the manifest and all that it names; keep the manifest last.

    The manifest comes last so that it never names a file that is not there.

    Returns:
        Lines for the operator.

    Raises:
        Refused: as `GatewayClient.fetch_manifest` and `GatewayClient.fetch_blob`.
    """
    folder = SiteFolder.open(root)
    lines = []
    with GatewayClient(folder) as client, _progress_bar() as progress:
        manifest, envelope = client.fetch_manifest()
        for artifact in manifest.artifacts:
            path = client.fetch_blob(artifact, progress)
            lines.append(f"  {artifact.role}: {artifact.file_name}, {artifact.bytes} bytes, verified as {path.name}")
        write_file(folder.manifest_path, envelope)
    return [f"Manifest {manifest.sequence} of {manifest.federation}, signature verified.", *lines]


@contextmanager
def _progress_bar() -> Iterator[Progress | None]:
    """Show a bar to a person; stay silent in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    with Bar(*columns, console=console) as bar:

        def show(role: str, done: int, total: int) -> None:
            if role not in tasks:
                tasks[role] = bar.add_task(role, total=total)
            bar.update(tasks[role], completed=done)

        yield show
