"""Patient-level split by a stable hash of the subject."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

TEST_SHARE = 0.25


def rank(subject: str) -> float:
    """A number in [0, 1) that depends on the subject alone: the same in every run, dataset and version."""
    return int.from_bytes(hashlib.sha256(b"sspformer-split-1:" + subject.encode()).digest()[:8], "big") / 2**64


def split(subjects: Iterable[str], test_share: float = TEST_SHARE) -> tuple[list[str], list[str]]:
    """Split subjects into training and held-out ones; a subject is never in both.

    A subject's side depends on its own hash alone, so adding patients moves nobody. The one exception: in a
    small cohort a side that would be empty (or, from eight subjects on, hold a single one) takes the subjects nearest
    to the border, and never are more than half held out.

    Args:
        subjects: subject names.
        test_share: expected share of held-out subjects.

    Returns:
        (train, test), each sorted.
    """
    ordered = sorted(set(subjects), key=lambda s: (rank(s), s))
    border = sum(rank(s) < test_share for s in ordered)
    fewest = 2 if len(ordered) >= 8 else min(1, len(ordered) // 2)
    border = min(max(border, fewest), len(ordered) // 2)
    return sorted(ordered[border:]), sorted(ordered[:border])
