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
_NO = {"", "0", "0.0", "false", "no", "n", "n/a", "na", "none"}
_NOT_MAGNITUDE = {"part-phase", "part-real", "part-imag"}


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
    roots = _subject_folders(folder)
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


def subjects_in(folder: Path) -> set[str]:
    """Everybody who has a folder in the dataset and has not opted out, whatever scans they have.

    Raises:
        Refused: E-DATA where the folder or its table of participants cannot be read.
    """
    return {root.name for root in _subject_folders(folder)} - read_opt_outs(folder)


def contrasts_in(folder: Path) -> dict[str, int]:
    """Number of subjects that have each contrast."""
    counts: dict[str, int] = {}
    for root in sorted(p for p in folder.glob("sub-*") if p.is_dir()):
        for contrast in {scan.contrast for scan in _scans_of(root)}:
            counts[contrast] = counts.get(contrast, 0) + 1
    return counts


def read_opt_outs(folder: Path) -> set[str]:
    """Subjects who opted out by the ``opt_out`` column of `participants.tsv`, as written there and as in the folder.

    In doubt a subject is left out: every entry that is not a plain no (or empty, or n/a) opts out, and neither case nor
    the leading zeros that a spreadsheet takes off an identifier tell two subjects apart.

    Raises:
        Refused: E-DATA where the table cannot be read; reading on could use a patient who opted out.
    """
    table = folder / "participants.tsv"
    if not table.exists() and not table.is_symlink():  # a link that leads nowhere is a table that cannot be read
        return set()
    try:
        with table.open(newline="", encoding="utf-8-sig") as handle:
            # A stray quote must not swallow the lines after it, and the opt-outs in them.
            lines = list(csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused(
            Code.DATA, f"{table} cannot be read ({type(error).__name__}).", "repair it: it may hold opt-outs."
        ) from error
    rows = [[cell.strip().strip('"').strip() for cell in line] for line in lines if any(line)]
    header = [re.sub(r"[-_ ]", "", name).lower() for name in rows[0]] if rows else []
    if rows and "participantid" not in header:
        raise Refused(Code.DATA, f"{table} has no participant_id column.", "repair it: it may hold opt-outs.")
    if "optout" not in header:
        return set()
    who, column = header.index("participantid"), header.index("optout")
    marked = [row[who] for row in rows[1:] if who < len(row) and column < len(row) and row[column].lower() not in _NO]
    named = {name if name.lower().startswith("sub-") else f"sub-{name}" for name in marked}
    labels = {_label(name) for name in named}
    return named | {root.name for root in _subject_folders(folder) if _label(root.name) in labels}


def contrast_of(path: Path) -> str | None:
    """The contrast that a BIDS file name states; None for another name, and for an image that is no magnitude."""
    match = _SCAN.match(path.name)
    if match is None:
        return None
    entities = (match["entities"] or "").split("_")
    if _NOT_MAGNITUDE.intersection(entities):
        return None
    enhanced = any(entity.startswith("ce-") for entity in entities)
    return f"ce-{match['suffix']}" if enhanced else match["suffix"]


def _subject_folders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith("sub-"))
    except OSError as error:
        raise Refused(
            Code.DATA, f"data folder {folder} cannot be read ({error.strerror}).", "let the site's user read it."
        ) from error


def _label(subject: str) -> str:
    return subject[len("sub-") :].casefold().lstrip("0")


def _scans_of(root: Path) -> list[Scan]:
    scans = []
    for path in sorted([*root.glob("anat/*.nii*"), *root.glob("ses-*/anat/*.nii*")]):
        contrast = contrast_of(path)
        if contrast is not None and path.name.startswith(f"{root.name}_"):
            scans.append(Scan(root.name, contrast, path))
    return scans
