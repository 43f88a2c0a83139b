"""A refusal is one line on stderr and exit 2."""

from __future__ import annotations

import sys

import pytest

from sspformer.contract.console import command_app, run_app
from sspformer.contract.errors import Code, Refused


@pytest.fixture
def app():
    app = command_app("Two lines.\n\nSecond line.")

    @app.command()
    def fail() -> None:
        raise Refused(Code.DATA, "a path\nwith a line end is empty.", "Name another.")

    @app.command()
    def break_down() -> None:
        raise ZeroDivisionError

    @app.command()
    def fine() -> None:
        print("done")

    return app


def run(app, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as end:
        run_app(app)
    return int(end.value.code or 0)


def test_a_refusal_is_one_line(app, monkeypatch, capsys):
    assert run(app, monkeypatch, "fail") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "E-DATA: a path with a line end is empty. Next: Name another.\n"


def test_success_is_zero(app, monkeypatch, capsys):
    assert run(app, monkeypatch, "fine") == 0
    assert capsys.readouterr().out == "done\n"


def test_misuse_is_two(app, monkeypatch, capsys):
    assert run(app, monkeypatch, "nonsense") == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(app, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool", "break-down"])
    with pytest.raises(ZeroDivisionError):
        run_app(app)


def test_help_explains(app, monkeypatch, capsys):
    assert run(app, monkeypatch, "--help") == 0
    assert "Second line." in capsys.readouterr().out
