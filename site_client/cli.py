"""The hospital's command line. Each command is thin: it imports its implementation when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sspformer.contract.console import command_app, run_app

app = command_app(
    "The hospital: fine-tunes the coordinator's model on MRI that stays here, within limits that the hospital sets.\n\n"
    "Its private keys are made here and never travel. Start with: site-client init SITE --name NAME --data DIR"
)

SiteFolder = Annotated[Path, typer.Argument(metavar="SITE", help="The site's folder.", show_default=False)]


@app.command()
def init(
    site: SiteFolder,
    name: Annotated[str, typer.Option(help="Name of the site: lower-case letters, digits and dashes.")],
    data: Annotated[Path, typer.Option(help="The site's BIDS dataset.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Make the site's folder and keys, and the request to hand to the coordinator."""
    from site_client.join import create

    for line in create(site, name=name, data=data, device=device):
        typer.echo(line)


@app.command()
def accept(
    site: SiteFolder,
    admission: Annotated[Path, typer.Argument(metavar="ADMISSION.json", help="What `central admit` wrote.")],
    fingerprint: Annotated[
        str, typer.Option(help="Fingerprint of the coordinator's key, as read out by the coordinator (`central init`).")
    ],
) -> None:
    """Verify the coordinator's admission and pin its key."""
    from site_client.join import accept as accept_admission

    for line in accept_admission(site, admission, fingerprint=fingerprint):
        typer.echo(line)


@app.command()
def fetch(site: SiteFolder) -> None:
    """Download the published encoder and head, resume where a cut left off, verify, store."""
    from site_client.fetch import fetch_published

    for line in fetch_published(site):
        typer.echo(line)


@app.command()
def start(site: SiteFolder) -> None:
    """Run the site's SuperNode and worker until Ctrl-C."""
    from site_client.start import start as start_site

    start_site(site)


@app.command()
def finetune(
    site: SiteFolder,
    plan: Annotated[Path | None, typer.Option(help="Take data and training from this run plan.")] = None,
    contrast: Annotated[list[str] | None, typer.Option(help="BIDS suffix to train on; repeat for more.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
) -> None:
    """Fine-tune a head on this hospital's patients alone, without any coordinator."""
    from site_client.alone import finetune_alone
    from sspformer.progress import shown

    with shown() as progress:
        lines = finetune_alone(site, plan, contrast or (), steps, progress)
    for line in lines:
        typer.echo(line)


@app.command()
def evaluate(
    site: SiteFolder,
    head: Annotated[list[str] | None, typer.Option(help="A head to score, as name=path; repeat for more.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Take the data from this run plan.")] = None,
    contrast: Annotated[list[str] | None, typer.Option(help="BIDS suffix; repeat for more.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Write example slices to this .npz file.")] = None,
) -> None:
    """Score heads on this hospital's held-out patients; nothing is sent."""
    from site_client.alone import evaluate_site
    from sspformer.evaluate import named_paths
    from sspformer.progress import shown

    with shown() as progress:
        lines = evaluate_site(site, named_paths(head or ()), plan, contrast or (), json_path, pictures, progress)
    for line in lines:
        typer.echo(line)


@app.command("apply")
def apply_to_scan(
    source: Annotated[Path, typer.Argument(metavar="IN.nii.gz", help="A 3D scan.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT.nii.gz", help="Must not exist.", show_default=False)],
    site: Annotated[Path, typer.Option(help="The site's folder.")] = Path("site"),
    head: Annotated[Path | None, typer.Option(help="Use this head rather than the current one.")] = None,
    contrast: Annotated[str | None, typer.Option(help="BIDS suffix, where the file's name does not state it.")] = None,
) -> None:
    """Denoise a scan with the current head; the output is a BIDS derivative on the input's own grid."""
    from site_client.alone import apply_head
    from sspformer.progress import shown

    with shown() as progress:
        lines = apply_head(site, source, target, head, contrast, progress)
    for line in lines:
        typer.echo(line)


def main() -> None:
    """Entry point of `site-client`."""
    run_app(app)


if __name__ == "__main__":
    main()
