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


def main() -> None:
    """Entry point of `site-client`."""
    run_app(app)


if __name__ == "__main__":
    main()
