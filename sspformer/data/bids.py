"""A hospital's data folder: a BIDS dataset, and which of its scans can be asked for."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from sspformer.contract.errors import Code, Refused

_SCAN = re.compile(
    r"^(?P<subject>sub-[A-Za-z0-9]+)(?:_(?P<entities>[A-Za-z0-9_-]+))?_(?P<suffix>[A-Za-z0-9]+)\.nii(\.gz)?$"
)
_YES = {"1", "true", "yes", "y"}


@dataclass(frozen=True)
class Scan:
    """One image of one subject. `contrast` is the BIDS suffix, with ``ce-`` before it for a contrast-enhanced scan."""

    subject: str
    contrast: str
    path: Path


@dataclass(frozen=True)
class Skipped:
    """Something in the folder that is not used, and why. Stays at the site."""

    where: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Scans by subject (sorted), and what was left out."""

    folder: Path
    subjects: dict[str, list[Scan]]
    skipped: list[Skipped]


def read_dataset(folder: Path, contrasts: tuple[str, ...]) -> Dataset:
    """List the scans of the asked contrasts; no image is opened.

    Subjects that `participants.tsv` marks in its ``opt_out`` column are left out here, so that nothing behind this
    function ever sees them.

    Args:
        folder: root of the BIDS dataset.
        contrasts: BIDS suffixes to take, ``ce-T1w`` for contrast-enhanced.

    Raises:
        Refused: E-DATA where the folder is missing, or holds no subject with an asked contrast.
    """
    if not folder.is_dir():
        raise Refused(Code.DATA, f"data folder {folder} does not exist.", "set `data` to a BIDS dataset (sub-*/anat).")
    roots = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith("sub-"))
    if not roots:
        raise Refused(Code.DATA, f"data folder {folder} holds no sub-* folder.", "set `data` to a BIDS dataset.")
    opted_out = read_opt_outs(folder)
    subjects: dict[str, list[Scan]] = {}
    skipped: list[Skipped] = []
    for root in roots:
        if root.name in opted_out:
            skipped.append(Skipped(root.name, "opted out"))
            continue
        scans = [scan for scan in _scans_of(root) if scan.contrast in contrasts]
        if scans:
            subjects[root.name] = scans
        else:
            skipped.append(Skipped(root.name, f"no scan of contrast {', '.join(contrasts)}"))
    if not subjects:
        raise Refused(
            Code.DATA,
            f"no subject in {folder} has a usable scan of contrast {', '.join(contrasts)}.",
            "ask for a contrast that the dataset holds, or add the scans.",
        )
    return Dataset(folder, subjects, skipped)


def contrasts_in(folder: Path) -> dict[str, int]:
    """Number of subjects that have each contrast."""
    counts: dict[str, int] = {}
    for root in sorted(p for p in folder.glob("sub-*") if p.is_dir()):
        for contrast in {scan.contrast for scan in _scans_of(root)}:
            counts[contrast] = counts.get(contrast, 0) + 1
    return counts


def read_opt_outs(folder: Path) -> set[str]:
    """Subjects whose ``opt_out`` in `participants.tsv` says yes.

    Raises:
        Refused: E-DATA where the table cannot be read; reading on could use a patient who opted out.
    """
    table = folder / "participants.tsv"
    if not table.exists():
        return set()
    try:
        with table.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(
            Code.DATA, f"{table} cannot be read ({type(error).__name__}).", "repair it: it may hold opt-outs."
        ) from error
    if rows and "participant_id" not in rows[0]:
        raise Refused(Code.DATA, f"{table} has no participant_id column.", "repair it: it may hold opt-outs.")
    opted = set()
    for row in rows:
        if (row.get("opt_out") or "").strip().lower() in _YES:
            subject = (row["participant_id"] or "").strip()
            opted.add(subject if subject.startswith("sub-") else f"sub-{subject}")
    return opted


def contrast_of(path: Path) -> str | None:
    """The contrast that a BIDS file name states, or None."""
    match = _SCAN.match(path.name)
    if match is None:
        return None
    return f"ce-{match['suffix']}" if "ce-" in (match["entities"] or "") else match["suffix"]


def _scans_of(root: Path) -> list[Scan]:
    scans = []
    for path in sorted([*root.glob("anat/*.nii*"), *root.glob("ses-*/anat/*.nii*")]):
        contrast = contrast_of(path)
        if contrast is not None and path.name.startswith(f"{root.name}_"):
            scans.append(Scan(root.name, contrast, path))
    return scans
