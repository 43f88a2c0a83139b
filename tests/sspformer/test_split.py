"""The split of patients: stable for ever, never both sides, nobody moves when a cohort grows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sspformer.data.split import TEST_SHARE, rank, split

NAMES = st.text(alphabet="ABCdef0123456789", min_size=1, max_size=6).map(lambda label: f"sub-{label}")


@pytest.mark.parametrize(
    ("subject", "expected"),
    [("sub-01", 0.5731065352304324), ("sub-CS4941", 0.6821124786515738), ("sub-N0001", 0.03904281818945134)],
)
def test_golden_ranks(subject, expected):
    """These numbers must never change: a patient would move from one side to the other."""
    assert rank(subject) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.sets(NAMES, min_size=1, max_size=60))
def test_disjoint_complete_and_sorted(subjects):
    train, test = split(subjects)
    assert not set(train) & set(test)
    assert set(train) | set(test) == subjects
    assert train == sorted(train)
    assert test == sorted(test)
    assert len(test) <= len(train)
    if len(subjects) >= 2:
        assert test
    if len(subjects) >= 8:
        assert len(test) >= 2


@settings(max_examples=200, deadline=None)
@given(st.sets(NAMES, min_size=1, max_size=40), st.sets(NAMES, max_size=40))
def test_adding_patients_moves_nobody_but_by_the_small_cohort_rule(before, added):
    """A patient's side is its own rank's, save where a small cohort took those nearest to the border."""
    for cohort in (before, before | added):
        train, test = split(cohort)
        natural = {s for s in cohort if rank(s) < TEST_SHARE}
        fewest = 2 if len(cohort) >= 8 else min(1, len(cohort) // 2)
        if fewest <= len(natural) <= len(cohort) // 2:
            assert set(test) == natural
        else:  # whoever crossed the border is nearest to it
            assert max((rank(s) for s in test), default=0) <= min(rank(s) for s in train)
            assert len(test) == (fewest if len(natural) < fewest else len(cohort) // 2)


def test_a_large_cohort_keeps_its_sides_and_its_share():
    names = [f"sub-{i:04d}" for i in range(2000)]
    small_train, small_test = split(names[:400])
    train, test = split(names)
    assert set(small_train) <= set(train)
    assert set(small_test) <= set(test)
    assert len(test) / len(names) == pytest.approx(TEST_SHARE, abs=0.03)


def test_order_and_repetition_do_not_matter():
    names = [f"sub-{i}" for i in range(20)]
    assert split(names) == split(reversed(names)) == split(names + names)


def test_one_patient_trains_and_none_is_held_out():
    assert split(["sub-1"]) == (["sub-1"], [])
    assert split([]) == ([], [])
