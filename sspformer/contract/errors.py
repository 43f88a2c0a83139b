"""Refusals: every expected failure is a code, one plain line, and a next step.

At the wall only the code crosses; the line stays on the machine that wrote it.
"""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """Stable codes. A code may be shown to the other side; the text of a refusal may not."""

    CONFIG = "E-CONFIG"  # a configuration file or key is wrong
    DATA = "E-DATA"  # a data folder or file cannot be used
    COHORT = "E-COHORT"  # too few usable patients for what was asked
    FORMAT = "E-FORMAT"  # an artifact is not the format it must be (a pickle, say)
    DIGEST = "E-DIGEST"  # bytes do not match their digest
    SIGNATURE = "E-SIGNATURE"  # a signature or its key is not the trusted one
    TENSORS = "E-TENSORS"  # names, shapes or values of tensors are not the agreed ones
    PLAN = "E-PLAN"  # the coordinator asks more than the site allows
    BUDGET = "E-BUDGET"  # the privacy budget does not cover the request
    GATEWAY = "E-GATEWAY"  # the coordinator cannot be reached or answered wrongly
    PORT = "E-PORT"  # a port is taken
    QUORUM = "E-QUORUM"  # too few sites answered in time
    STATE = "E-STATE"  # state on disk is missing, locked or damaged
    INTERNAL = "E-INTERNAL"  # a defect: the details are in the local log


class Refused(Exception):
    """An expected failure.

    Args:
        code: what kind of failure, safe to show to the other side.
        what: one plain line naming the file or key and the reason.
        next_step: what the reader should do now.
    """

    def __init__(self, code: Code, what: str, next_step: str) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.code}: {self.what} Next: {self.next_step}"
