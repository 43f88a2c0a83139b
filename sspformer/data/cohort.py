"""A hospital's usable patients, split and cached: what training and evaluation read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sspformer.contract.errors import Code, Refused
from sspformer.data.bids import Skipped, read_dataset, read_opt_outs, subjects_in
from sspformer.data.cache import Entry, Example, FeatureCache
from sspformer.data.split import split


@dataclass
class Cohort:
    """Patients with their cache entries.

    Attributes:
        train, test: subjects, sorted.
        entries: cache entries by subject; one per scan and noise variant.
        skipped: what was left out and why; stays at the site.
        mri_bytes: size of the image files that were read.
    """

    cache: FeatureCache
    train: list[str]
    test: list[str]
    entries: dict[str, list[Entry]]
    skipped: list[Skipped] = field(default_factory=list)
    mri_bytes: int = 0

    def examples(self, subject: str) -> list[Example]:
        """All slices of one patient, read from the cache."""
        return [self.cache.load(entry) for entry in self.entries[subject]]

    def is_whole(self) -> bool:
        """Whether every entry is still on the disk: somebody may have emptied the cache meanwhile."""
        return all(entry.path.exists() for entries in self.entries.values() for entry in entries)

    def skipped_lines(self, at_most: int = 5) -> list[str]:
        """What was left out and why, for the eyes of whoever holds the data."""
        lines = [f"  skipped {skipped.where}: {skipped.reason}" for skipped in self.skipped[:at_most]]
        more = len(self.skipped) - at_most
        return lines + ([f"  and {more} more"] if more > 0 else [])

    def slice_count(self, subject: str) -> int:
        """Slices of one patient, over all scans and noise variants."""
        return sum(entry.slices for entry in self.entries[subject])

    def slice_at(self, subject: str, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One slice of a patient, 0 <= number < `slice_count`: features (N, D), base, target, inside (1, H, W)."""
        for entry in self.entries[subject]:
            if number < entry.slices:
                e = self.cache.load(entry)
                return e.features[number], e.base[number][None], e.target[number][None], e.inside[number][None]
            number -= entry.slices
        raise IndexError(f"{subject} has no slice of that number")


def open_cohort(
    folder: Path,
    contrasts: tuple[str, ...],
    cache: FeatureCache,
    variants: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Cohort:
    """Read a dataset, fill the cache, split the patients. A broken scan is skipped and reported, never fatal.

    Args:
        folder: BIDS dataset.
        contrasts: BIDS suffixes to take.
        cache: where features are kept.
        variants: noise variants per training scan; a held-out scan has one.
        progress: called with (subjects done, subjects in all).

    Raises:
        Refused: E-DATA where no training scan at all is usable, E-STATE where the cache cannot be written.
    """
    if folder.is_dir():
        cache.forget(read_opt_outs(folder))  # before anything can refuse: an opt-out counts in any case
    dataset = read_dataset(folder, contrasts)
    # Somebody without the contrast of this run is still a patient here, and may be in another run's warm cohort.
    cache.keep_only(subjects_in(folder))
    train, test = split(dataset.subjects)
    cohort = Cohort(cache, train, test, {}, list(dataset.skipped))
    held_out = set(test)
    for done, (subject, scans) in enumerate(dataset.subjects.items()):
        progress(done, len(dataset.subjects))
        for scan in scans:
            try:
                entries = [cache.entry(scan, v) for v in range(1 if subject in held_out else variants)]
            except Refused as refusal:
                if refusal.code is not Code.DATA:
                    raise
                cohort.skipped.append(Skipped(str(scan.path), refusal.what))
                continue
            cohort.entries.setdefault(subject, []).extend(entries)
            cohort.mri_bytes += scan.path.stat().st_size
    progress(len(dataset.subjects), len(dataset.subjects))
    cohort.train = [s for s in train if s in cohort.entries]
    cohort.test = [s for s in test if s in cohort.entries]
    if not cohort.train:
        reasons = "; ".join(s.reason for s in cohort.skipped[:3])
        raise Refused(Code.DATA, f"no training patient in {folder} is usable ({reasons}).", "repair or add scans.")
    return cohort
