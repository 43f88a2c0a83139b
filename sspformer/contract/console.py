"""How the three commands end: a refusal is one line on stderr and exit 2, never a traceback."""

from __future__ import annotations

import sys

import typer

from sspformer.contract.errors import Refused


def command_app(help_text: str) -> typer.Typer:
    """Make an application whose commands are always named, even when there is only one."""
    app = typer.Typer(help=help_text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback(help=help_text)(lambda: None)
    return app


def run_app(app: typer.Typer) -> None:
    """Run a command line to its end.

    Exit status: 0 done, 2 refused or misused, 130 interrupted. Anything else is a defect and keeps its traceback.
    """
    try:
        app()
    except Refused as refusal:
        line = " ".join(str(refusal).split())  # one line, whatever a path or a library put into it
        print(line, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
