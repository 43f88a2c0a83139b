"""Randomness of the mechanism: right distributions, from a stream that nobody can repeat."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from scipy import stats

from site_client.privacy.sampling import CryptoSource, choose_slices, draw_patients
from sspformer.contract.errors import Code, Refused

KEY = bytes(range(32))


def test_the_stream_is_aes_in_counter_mode():
    """Against the block cipher itself: block i is AES(key, i)."""
    block = Cipher(AES(KEY), ECB()).encryptor()
    expected = b"".join(block.update(i.to_bytes(16, "big")) for i in range(4))
    assert CryptoSource(KEY).uint64(8).tobytes() == expected


def test_long_draws_continue_the_same_stream():
    whole = CryptoSource(KEY).uint64(300_000)
    source = CryptoSource(KEY)
    assert np.array_equal(whole, np.concatenate([source.uint64(7), source.uint64(299_993)]))


def test_fresh_sources_differ_and_a_key_has_32_bytes():
    assert not np.array_equal(CryptoSource().uint64(4), CryptoSource().uint64(4))
    with pytest.raises(ValueError, match="32 bytes"):
        CryptoSource(b"short")


@pytest.mark.parametrize("count", [1, 2, 7, 1_000_001])
def test_normals_are_standard_normal(count):
    normals = CryptoSource(KEY).normal(count)
    assert normals.shape == (count,)
    assert normals.dtype == np.float64
    assert np.isfinite(normals).all()
    if count > 1000:
        assert stats.kstest(normals, "norm").pvalue > 0.01
        assert abs(normals.mean()) < 4 / count**0.5
        assert normals.std() == pytest.approx(1, abs=4 / (2 * count) ** 0.5)
        assert abs(stats.kurtosis(normals)) < 0.03
        half = count // 2
        assert abs(np.corrcoef(normals[:half], normals[half : 2 * half])[0, 1]) < 5 / half**0.5


def test_a_uniform_of_zero_or_all_ones_gives_a_finite_normal(monkeypatch):
    for word in (0, 2**64 - 1):
        monkeypatch.setattr(CryptoSource, "uint64", lambda _, n, word=word: np.full(n, word, dtype=np.uint64))
        assert np.isfinite(CryptoSource(KEY).normal(4)).all()
        assert abs(CryptoSource(KEY).normal(4)).max() < 8.6


def test_below_is_uniform():
    source = CryptoSource(KEY)
    counts = np.bincount([source.below(6) for _ in range(6000)], minlength=6)
    assert stats.chisquare(counts).pvalue > 0.01
    with pytest.raises(ValueError, match="below 0"):
        source.below(0)


def test_poisson_draw_is_binomial_and_independent_per_patient():
    source, patients, q, draws = CryptoSource(KEY), list(range(40)), 0.2, 5000
    drawn = np.zeros((draws, len(patients)))
    for row in drawn:
        row[draw_patients(patients, q, source)] = 1
    sizes = drawn.sum(axis=1)
    assert sizes.mean() == pytest.approx(q * 40, abs=4 * (40 * q * (1 - q) / draws) ** 0.5)
    assert sizes.var() == pytest.approx(40 * q * (1 - q), rel=0.08)
    assert drawn.mean(axis=0) == pytest.approx(np.full(40, q), abs=5 * (q * (1 - q) / draws) ** 0.5)
    pairs = np.corrcoef(drawn.T)[np.triu_indices(40, 1)]
    assert abs(pairs).max() < 5.5 / draws**0.5


def test_poisson_draw_at_the_edges():
    source = CryptoSource(KEY)
    assert draw_patients(list("abc"), 1.0, source) == list("abc")
    assert draw_patients([], 0.5, source) == []
    assert draw_patients(list("abc"), 1e-15, source) == []  # an empty draw is a draw
    for q in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="sample rate"):
            draw_patients(list("abc"), q, source)


def test_a_patient_listed_twice_is_refused():
    with pytest.raises(Refused) as refusal:
        draw_patients(["sub-1", "sub-2", "sub-1"], 0.5, CryptoSource(KEY))
    assert refusal.value.code is Code.DATA
    assert "sub-1" not in str(refusal.value)


def test_slices_are_distinct_and_uniform():
    source = CryptoSource(KEY)
    counts = np.zeros(10)
    for _ in range(4000):
        chosen = choose_slices(10, 3, source)
        assert len(set(chosen)) == 3
        assert chosen == sorted(chosen)
        counts[chosen] += 1
    assert stats.chisquare(counts).pvalue > 0.01
    assert choose_slices(2, 5, source) == [0, 1]
    assert choose_slices(0, 5, source) == []


def test_a_source_is_neither_copied_nor_stored():
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="not copied"):
            duplicate(CryptoSource(KEY))


def test_a_forked_child_may_not_repeat_the_stream(monkeypatch):
    source = CryptoSource(KEY)
    monkeypatch.setattr(os, "getpid", lambda: -1)  # what the child of a fork would see: another process id
    with pytest.raises(RuntimeError, match="fork"):
        source.uint64(1)
