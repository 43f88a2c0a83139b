"""`central status` and `central head export`: what the coordinator's folder says, without any process running."""

from __future__ import annotations

from pathlib import Path

from central.federation import Federation
from central.registry import Publication, SiteRegistry
from central.store import head_shapes, open_run, runs_folder, write_head
from sspformer.contract.canonical import digest_file
from sspformer.contract.errors import Code, Refused


def describe(root: Path) -> list[str]:
    """Lines for the operator.

    Raises:
        Refused: E-CONFIG or E-STATE, the folder is not a coordinator's.
    """
    federation = Federation.open(root)
    lines = [f"Federation {federation.config.name}, {federation.config.host}"]
    if federation.manifest_path.exists():
        manifest = Publication(federation).manifest()
        lines += [f"  {item.role}: {item.file_name}, {item.bytes} bytes, {item.digest}" for item in manifest.artifacts]
    else:
        lines.append("  nothing published")
    lines += [f"  site {site.name}, since {site.since}" for site in SiteRegistry(federation.sites_path).sites()]
    for folder in sorted(runs_folder(federation).glob("*/plan.json")):
        store, plan = open_run(federation, folder.parent.name)
        status = store.status()
        state = str(status["state"])
        if state in ("waiting", "running", "delivering") and not store.is_held():
            state = f"interrupted; continue with: central run {root} --resume {plan.run}"
        lines.append(f"  run {plan.run}: {store.last_round()} of {plan.rounds} rounds, {state}")
    return lines


def export_head(root: Path, run: str, output: Path, after: int | None = None) -> list[str]:
    """Write the published head plus the global difference after a round.

    Raises:
        Refused: as `open_run`; E-STATE, there is no such round; E-DIGEST, the plan's head is no longer published, or
            the file that bears its digest is another one.
    """
    federation = Federation.open(root)
    store, plan = open_run(federation, run)
    published = Publication(federation).blob_path(plan.head)
    number = store.last_round() if after is None else after
    if number < 1 or not store.checkpoint(number).exists():
        raise Refused(
            Code.STATE,
            f"Run {run} has no head after round {number}; {store.last_round()} rounds are closed.",
            "Choose a closed round with --round, or run on.",
        )
    if not published.is_file() or digest_file(published) != plan.head:
        raise Refused(
            Code.DIGEST,
            f"{published} is not the head that run {run} started from.",
            "Publish that head again, or restore the file from the backup of the coordinator's folder.",
        )
    digest = write_head(published, store.head(number, head_shapes(published)), output)
    return [f"Wrote the global head of run {run} after round {number} to {output} ({digest})."]
