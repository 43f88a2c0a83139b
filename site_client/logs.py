"""A worker's two logs: codes and numbers for whoever runs the machine, every text for the operator alone.

``logs/worker.log`` (the worker's stderr) gets events: a name or a refusal's code, and numbers that say nothing about
patients. ``logs/operator.log`` (0600) gets the rest: paths, names, tracebacks, how many patients were drawn. Neither
is sent anywhere, but the first is what a hospital forwards to a log server or attaches to a question.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from enum import StrEnum
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from sspformer.contract.durable import SECRET_MODE, make_private_folder
from sspformer.contract.errors import Code

EVENTS = logging.getLogger("site_client.events")
_MAX_BYTES = 8 << 20
_KEPT_FILES = 3


class Event(StrEnum):
    """What a worker does when all is well."""

    READY = "READY"
    TRAINED = "TRAINED"
    REPEATED = "REPEATED"
    FINISHED = "FINISHED"
    NODE_AWAY = "NODE-AWAY"


def event(what: Event | Code, **numbers: int) -> None:
    """Log an event. Neither argument can carry a text."""
    EVENTS.info(" ".join([what.value, *(f"{name}={int(number)}" for name, number in numbers.items())]))


def open_logs(root: Path, stream: TextIO) -> None:
    """Send events to a stream, and everything that this process says in any other way to the operator's file.

    Call it once, when the libraries are imported: some of them bring handlers of their own.

    Args:
        root: the site's folder.
        stream: where events go.
    """
    make_private_folder(root / "logs")
    for known in list(logging.root.manager.loggerDict.values()):
        if isinstance(known, logging.Logger):
            known.handlers.clear()
            known.propagate = True
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    operator = _PrivateFile(root / "logs" / "operator.log", maxBytes=_MAX_BYTES, backupCount=_KEPT_FILES)
    operator.setFormatter(form)
    logging.basicConfig(level=logging.INFO, handlers=[operator], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every look for a task
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a line that cannot be written (a full disk) must not land on stderr instead
    events = logging.StreamHandler(stream)
    events.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    EVENTS.addHandler(events)
    sys.excepthook = lambda kind, error, trace: _uncaught(error)
    threading.excepthook = lambda arguments: _uncaught(arguments.exc_value)


def _uncaught(error: BaseException | None) -> None:
    logging.getLogger(__name__).critical("not caught", exc_info=error)
    event(Code.INTERNAL)


class _PrivateFile(RotatingFileHandler):
    """A log file, and its older parts, for the owner alone."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, SECRET_MODE)
        os.fchmod(descriptor, SECRET_MODE)  # also where the file was there already
        return TextIOWrapper(os.fdopen(descriptor, "ab"), encoding="utf-8", errors="backslashreplace")
