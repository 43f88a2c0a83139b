"""Randomness of the DP mechanism: who is drawn, which slices, and the noise. From a cryptographic generator only.

torch's and numpy's generators are predictable (torch's on CPU reads the low 32 bits of a seed): whoever guesses the
state subtracts the noise. The stream here is AES-256 in counter mode, keyed by the operating system; rather than
ChaCha20, because its 128-bit counter has no wrap to guard and processors have it in hardware.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import NoReturn, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from sspformer.contract.errors import Code, Refused

T = TypeVar("T", bound=Hashable)

_KEY_BYTES = 32
_ZEROS = bytes(1 << 20)


class CryptoSource:
    """A stream of random numbers keyed by 32 secret bytes. Not shared between processes, not copied, not stored.

    Args:
        key: 32 bytes for a test that needs the same numbers twice; None draws a fresh key from the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        if key is None:
            key = os.urandom(_KEY_BYTES)
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a key has {_KEY_BYTES} bytes, not {len(key)}")
        # A fresh key never repeats, so the counter may start at zero.
        self._stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
        self._process = os.getpid()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a random source is not copied: two copies would add the same noise twice")

    def uint64(self, count: int) -> NDArray[np.uint64]:
        """`count` uniform 64-bit integers.

        Raises:
            RuntimeError: in a forked child, whose stream would repeat its parent's.
        """
        if os.getpid() != self._process:
            raise RuntimeError("this random source belongs to the parent process: make a new one after a fork")
        stream = bytearray(count * 8)
        view = memoryview(stream)
        for start in range(0, len(stream), len(_ZEROS)):
            piece = view[start : start + len(_ZEROS)]
            self._stream.update_into(_ZEROS[: len(piece)], piece)
        return np.frombuffer(stream, dtype="<u8").astype(np.uint64, copy=False)

    def normal(self, count: int) -> NDArray[np.float64]:
        """`count` standard normal numbers.

        Box-Muller on 53-bit uniforms: exact in distribution but for rounding, symmetric, and it reaches 8.57 standard
        deviations (mass beyond: 1e-17, far below any delta); an inverse of the distribution function loses its upper
        tail where uniforms crowd at 1. The gradient that is released carries 24 of the 53 bits, which hides the
        pattern that floating-point normals have in their last bits.
        """
        pairs = (count + 1) // 2
        uniforms = self.uint64(2 * pairs) >> np.uint64(11)
        radius = uniforms[:pairs].astype(np.float64)
        radius += 1.0  # (0, 1]: the logarithm of 0 is not a number to add
        radius *= 2.0**-53
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle = uniforms[pairs:].astype(np.float64)
        angle *= 2.0 * math.pi * 2.0**-53
        normals = np.empty(2 * pairs)
        np.multiply(radius, np.cos(angle), out=normals[:pairs])
        np.multiply(radius, np.sin(angle, out=angle), out=normals[pairs:])
        return normals[:count]

    def below(self, limit: int) -> int:
        """A uniform integer in [0, limit), without the bias of a remainder."""
        if not 0 < limit <= 1 << 63:
            raise ValueError(f"no uniform integer below {limit}")
        fair = (1 << 64) - (1 << 64) % limit
        while True:
            value = int(self.uint64(1)[0])
            if value < fair:
                return value % limit


def draw_patients(patients: Sequence[T], sample_rate: float, source: CryptoSource) -> list[T]:
    """A Poisson draw: each patient enters with probability `sample_rate`, independently of all others, at most once.

    The draw may be empty. Neither the rate nor anything else here depends on how many patients there are.

    Args:
        patients: the site's training patients, each once.
        sample_rate: the plan's public q in (0, 1].
        source: where the randomness comes from.

    Raises:
        Refused: E-DATA where a patient is listed twice: twice the draws would be twice the influence.
    """
    if not 0 < sample_rate <= 1:
        raise ValueError(f"a sample rate is in (0, 1], not {sample_rate}")
    check_distinct(patients)
    # P(u < threshold) = threshold / 2^64: the rate rounded down by at most 2^-64, never up.
    threshold = int(Fraction(sample_rate) * (1 << 64))
    uniforms = source.uint64(len(patients))
    return [patient for patient, u in zip(patients, uniforms.tolist(), strict=True) if u < threshold]


def choose_slices(available: int, at_most: int, source: CryptoSource) -> list[int]:
    """Up to `at_most` different slices of one patient's `available`, uniformly: sorted indices."""
    chosen = list(range(available))
    for place in range(min(at_most, available)):  # the first steps of a Fisher-Yates shuffle
        other = place + source.below(available - place)
        chosen[place], chosen[other] = chosen[other], chosen[place]
    return sorted(chosen[:at_most])


def check_distinct(patients: Sequence[Hashable]) -> None:
    """Refuses a list that names a patient twice.

    Raises:
        Refused: E-DATA.
    """
    if len(set(patients)) != len(patients):
        raise Refused(
            Code.DATA,
            "a patient is listed more than once among the training patients.",
            "give every patient one subject folder; sessions and contrasts belong inside it.",
        )
