"""The coordinator's command line. Each command is thin: it imports its implementation when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sspformer.contract.console import command_app, run_app

app = command_app(
    "The coordinator: publishes a frozen encoder, admits hospitals and runs rounds of fine-tuning.\n\n"
    "It holds heads and signatures, never an image. Start with: central init STATE --name NAME --host HOST"
)

State = Annotated[Path, typer.Argument(metavar="STATE", help="The coordinator's folder.", show_default=False)]


@app.command()
def init(
    state: State,
    name: Annotated[str, typer.Option(help="Name of the federation: lower-case letters, digits and dashes.")],
    host: Annotated[str, typer.Option(help="DNS name or IP address at which hospitals reach this machine.")],
    gateway_port: Annotated[int, typer.Option(help="The one port that hospitals reach for artifacts.")] = 8443,
    superlink_port: Annotated[int, typer.Option(help="Port of Flower's SuperLink.")] = 8444,
) -> None:
    """Make the coordinator's folder, keys and certificates. Refuses to overwrite."""
    from central.federation import create

    for line in create(state, name=name, host=host, gateway_port=gateway_port, superlink_port=superlink_port):
        typer.echo(line)


@app.command()
def admit(
    state: State,
    request: Annotated[Path, typer.Argument(metavar="REQUEST.json", help="What `site-client init` wrote.")],
    fingerprint: Annotated[
        str, typer.Option(help="Fingerprint of the hospital's key, as the hospital read it out (`site-client init`).")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the admission goes; beside the request if not given.")
    ] = None,
) -> None:
    """Check a hospital's request, issue its certificate and write its sealed admission."""
    from central.admission import admit_file

    for line in admit_file(state, request, output, fingerprint=fingerprint):
        typer.echo(line)


@app.command()
def remove(
    state: State, site: Annotated[str, typer.Argument(metavar="SITE", help="Name of the site.", show_default=False)]
) -> None:
    """Take a hospital out: the gateway refuses it, no round asks it, its keys are not admitted again."""
    from central.admission import remove_site

    for line in remove_site(state, site):
        typer.echo(line)


@app.command()
def publish(
    state: State,
    encoder: Annotated[Path, typer.Option(help="Frozen encoder, safetensors.")],
    head: Annotated[Path, typer.Option(help="Warm head that training starts from, safetensors.")],
) -> None:
    """Copy the encoder and the warm head by digest and sign the manifest. Never loads them."""
    from central.registry import publish_files

    for line in publish_files(state, encoder=encoder, head=head):
        typer.echo(line)


@app.command()
def serve(state: State) -> None:
    """Run gateway, SuperLink and SuperExec until Ctrl-C."""
    from central.serve import serve as serve_coordinator

    serve_coordinator(state)


@app.command()
def run(
    state: State,
    plan: Annotated[Path | None, typer.Argument(metavar="PLAN.yaml", help="The plan of a new run.")] = None,
    resume: Annotated[str | None, typer.Option(help="Name of a run to continue after its last closed round.")] = None,
) -> None:
    """Run the rounds of a plan and show each as it closes."""
    from central.submit import resume_run, run_plan

    if (plan is None) == (resume is None):
        raise typer.BadParameter("give a PLAN.yaml for a new run, or --resume RUN")
    if plan is not None:
        run_plan(state, plan)
    elif resume is not None:
        resume_run(state, resume)


@app.command()
def status(state: State) -> None:
    """Show what is published, who is admitted and how the runs stand."""
    from central.status import describe

    for line in describe(state):
        typer.echo(line)


head = command_app("The global head of a run.")
app.add_typer(head, name="head")


@head.command("export")
def export(
    state: State,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write, safetensors.")],
    after: Annotated[int | None, typer.Option("--round", help="After which round; the last one if not given.")] = None,
) -> None:
    """Write the global head of a run as one safetensors file."""
    from central.status import export_head

    for line in export_head(state, run, output, after):
        typer.echo(line)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder that everything is written to.")] = Path("runs/demo"),
    site: Annotated[list[Path] | None, typer.Option(help="A hospital's BIDS folder; repeat for each.")] = None,
    patients: Annotated[int, typer.Option(min=4, help="Patients per hospital, where no folder is given.")] = 220,
    seed: Annotated[int, typer.Option(help="Decides the patients, where no folder is given.")] = 1,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each run, for a quick look.")] = None,
) -> None:
    """Run a coordinator and three hospitals on this machine and write a report."""
    from central.demo.run import Demo, show_demo

    show_demo(Demo(out, tuple(site or ()), patients, seed, rounds))


def main() -> None:
    """Entry point of `central`."""
    run_app(app)


if __name__ == "__main__":
    main()
