"""A hospital's usable patients, split and cached: what training and evaluation read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sspformer.contract.errors import Code, Refused
from sspformer.data.bids import Skipped, read_dataset
from sspformer.data.cache import Example, FeatureCache
from sspformer.data.split import split


@dataclass
class Cohort:
    """Patients with their cache entries.

    Attributes:
        train, test: subjects, sorted.
        entries: paths of cache entries by subject; one per scan and noise variant.
        skipped: what was left out and why; stays at the site.
        mri_bytes: size of the image files that were read.
    """

    cache: FeatureCache
    train: list[str]
    test: list[str]
    entries: dict[str, list[Path]]
    skipped: list[Skipped] = field(default_factory=list)
    mri_bytes: int = 0

    def examples(self, subject: str) -> list[Example]:
        """All slices of one patient, read from the cache."""
        return [self.cache.load(path) for path in self.entries[subject]]


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
        Refused: E-DATA where no scan at all is usable.
    """
    dataset = read_dataset(folder, contrasts)
    cache.keep_only(set(dataset.subjects))
    train, test = split(dataset.subjects)
    cohort = Cohort(cache, train, test, {}, list(dataset.skipped))
    held_out = set(test)
    for done, (subject, scans) in enumerate(dataset.subjects.items()):
        progress(done, len(dataset.subjects))
        for scan in scans:
            try:
                paths = [cache.entry(scan, v) for v in range(1 if subject in held_out else variants)]
            except Refused as refusal:
                cohort.skipped.append(Skipped(str(scan.path), refusal.what))
                continue
            cohort.entries.setdefault(subject, []).extend(paths)
            cohort.mri_bytes += scan.path.stat().st_size
    progress(len(dataset.subjects), len(dataset.subjects))
    cohort.train = [s for s in train if s in cohort.entries]
    cohort.test = [s for s in test if s in cohort.entries]
    if not cohort.train:
        reasons = "; ".join(s.reason for s in cohort.skipped[:3])
        raise Refused(Code.DATA, f"no training patient in {folder} is usable ({reasons}).", "repair or add scans.")
    return cohort
