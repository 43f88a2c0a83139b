"""Attacks on the DP mechanism. Each is a check that holds; each rule has a mutant that makes the same check fail."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from site_client.privacy import mechanism
from site_client.privacy.sampling import CryptoSource, draw_patients
from sspformer.contract.errors import Refused

KEY = bytes(range(32))
SIZE = 200_000
Q, COHORT, C, SIGMA = 0.2, 48, 1.0, 1.31
EXPECTED = Q * COHORT


class Site:
    """A site whose patients' gradients are known: the attacker's best case."""

    def __init__(self) -> None:
        self.first = nn.Parameter(torch.zeros(SIZE // 2))
        self.second = nn.Parameter(torch.zeros(SIZE - SIZE // 2))
        self.gradients = {f"sub-{i}": torch.full((SIZE,), 0.01 / math.sqrt(SIZE)) for i in range(COHORT)}

    def loss(self, patient: str) -> torch.Tensor:
        gradient = self.gradients[patient]
        return (self.first * gradient[: SIZE // 2]).sum() + (self.second * gradient[SIZE // 2 :]).sum()

    def step(self, patients: list[str], source: CryptoSource | None = None, **constants: float) -> torch.Tensor:
        return mechanism.private_gradient(
            [self.first, self.second],
            patients,
            self.loss,
            clipping_norm=constants.get("clipping_norm", C),
            noise_multiplier=constants.get("noise_multiplier", SIGMA),
            expected_patients=constants.get("expected_patients", EXPECTED),
            source=source or CryptoSource(KEY),
        )


@pytest.fixture
def site() -> Site:
    return Site()


# --- one patient's influence


def influence(site: Site, drawn: list[str], added: list[str]) -> float:
    """How far `added` moves the released sum, in units of the clipping norm, with the noise held fixed."""
    with_added, without = site.step(drawn + added), site.step(drawn)
    return float(torch.linalg.vector_norm(with_added - without, dtype=torch.float64)) * EXPECTED / C


def outlier(site: Site, gradient: torch.Tensor) -> list[str]:
    site.gradients["outlier"] = gradient
    return ["outlier"]


OUTLIERS = {
    "huge": torch.full((SIZE,), 1e6),
    "in one tensor": torch.cat([torch.full((SIZE // 2,), 1e6), torch.zeros(SIZE - SIZE // 2)]),
    "in one coordinate": torch.cat([torch.tensor([1e30]), torch.zeros(SIZE - 1)]),
    "not a number": torch.full((SIZE,), math.nan),
    "infinite": torch.full((SIZE,), math.inf),
}


@pytest.mark.parametrize("name", OUTLIERS)
def test_no_patient_moves_the_sum_by_more_than_c(site, name):
    drawn = list(site.gradients)[:10]
    assert influence(site, drawn, outlier(site, OUTLIERS[name])) <= 1 + 1e-4


def test_mutant_without_clipping(site, monkeypatch):
    monkeypatch.setattr(mechanism, "_clipping_factor", lambda *args: 1.0)
    assert influence(site, [], outlier(site, OUTLIERS["huge"])) > 100


def test_mutant_that_clips_each_tensor_by_itself(site, monkeypatch):
    def per_tensor(gradient: torch.Tensor, clipping_norm: float, tally: object) -> float:
        halves = (gradient[: SIZE // 2], gradient[SIZE // 2 :])
        return min(clipping_norm / float(torch.linalg.vector_norm(half)) for half in halves)

    monkeypatch.setattr(mechanism, "_clipping_factor", per_tensor)
    assert influence(site, [], outlier(site, OUTLIERS["huge"])) == pytest.approx(math.sqrt(2), rel=1e-3)


def test_mutant_that_keeps_what_is_not_finite(site, monkeypatch):
    monkeypatch.setattr(mechanism, "_clipping_factor", lambda *args: 1e-9)
    assert not influence(site, [], outlier(site, OUTLIERS["not a number"])) <= 1 + 1e-4


def influence_of_a_patient_listed_twice(site: Site) -> float:
    try:
        return influence(site, [], outlier(site, OUTLIERS["huge"]) * 2)
    except Refused:
        return 0.0


def test_a_patient_listed_twice_has_no_double_influence(site):
    assert influence_of_a_patient_listed_twice(site) <= 1 + 1e-4


def test_mutant_that_accepts_duplicates(site, monkeypatch):
    monkeypatch.setattr(mechanism, "check_distinct", lambda patients: None)
    assert influence_of_a_patient_listed_twice(site) == pytest.approx(2, rel=1e-3)


# --- the noise


def noise_scale(site: Site) -> float:
    """The measured standard deviation of an empty step, in units of sigma * C / expected."""
    return float(site.step([]).std()) / (SIGMA * C / EXPECTED)


def test_the_noise_is_as_large_as_promised(site):
    assert noise_scale(site) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("factor", [0.0, 1 / 8, 0.97])
def test_mutant_with_less_noise(site, monkeypatch, factor):
    real = CryptoSource.normal
    monkeypatch.setattr(CryptoSource, "normal", lambda source, count: factor * real(source, count))
    assert noise_scale(site) != pytest.approx(1, rel=0.01)


def leftover_of_a_difference(site: Site, sources: tuple[CryptoSource, CryptoSource]) -> float:
    """Noise left when two steps are subtracted; the attack works if it is none. Fresh noise leaves sqrt(2)."""
    one, two = (site.step([], source) for source in sources)
    return float((one - two).std()) / (SIGMA * C / EXPECTED)


def test_noise_is_never_repeated(site):
    one = CryptoSource()
    assert leftover_of_a_difference(site, (one, one)) == pytest.approx(math.sqrt(2), rel=0.02)
    assert leftover_of_a_difference(site, (one, CryptoSource())) == pytest.approx(math.sqrt(2), rel=0.02)


def test_mutant_with_a_fixed_key(site):
    assert leftover_of_a_difference(site, (CryptoSource(KEY), CryptoSource(KEY))) == 0


def correlation_with_a_guessed_seed(site: Site, seed: int = 0) -> float:
    """The attacker seeds torch and numpy as the run's public plan says and predicts the noise."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    released = site.step([], CryptoSource()).numpy()
    torch.manual_seed(seed)
    guess = torch.randn(SIZE, dtype=torch.float64).numpy()
    return float(np.corrcoef(released, guess)[0, 1])


def test_noise_does_not_come_from_a_seed_of_the_plan(site):
    assert abs(correlation_with_a_guessed_seed(site)) < 0.02


def test_mutant_that_draws_noise_from_torch(site, monkeypatch):
    monkeypatch.setattr(CryptoSource, "normal", lambda _, n: torch.randn(n, dtype=torch.float64).numpy())
    assert correlation_with_a_guessed_seed(site) > 0.99


def repeats_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether parent and child add the same noise."""
    source = CryptoSource(KEY)
    child = CryptoSource(KEY)  # what fork leaves in the child: the same state
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        try:
            return bool(np.array_equal(child.normal(8), source.normal(8)))
        except RuntimeError:
            return False


def test_a_fork_does_not_repeat_the_noise(monkeypatch):
    assert not repeats_after_a_fork(monkeypatch)


def test_mutant_that_does_not_know_its_process(monkeypatch):
    real = CryptoSource.__init__

    def forgetful(self: CryptoSource, key: bytes | None = None) -> None:
        real(self, key)
        self._process = -1

    monkeypatch.setattr(CryptoSource, "__init__", forgetful)
    assert repeats_after_a_fork(monkeypatch)


# --- neighbouring cohorts: nothing public may be a function of how many patients there are


def fingerprint(cohort: int, site: Site, draw=None, expected=None) -> tuple[float, float, list[str]]:
    """What a coordinator could measure with one patient more or less.

    Returns:
        the rate at which a given patient is drawn, the noise's scale, and who of the first 48 is drawn.
    """
    draw = draw or draw_patients
    patients = [f"sub-{i}" for i in range(cohort)]
    source = CryptoSource(KEY)
    rate = np.mean([patients[0] in draw(patients, Q, source) for _ in range(4000)])
    first = [name for name in draw(patients, Q, CryptoSource(KEY)) if name != "sub-48"]
    constants = {} if expected is None else {"expected_patients": expected(cohort)}
    return float(rate), float(site.step([], **constants).std()), first


def test_48_and_49_patients_have_the_same_rate_divisor_and_noise(site):
    rate_48, noise_48, drawn_48 = fingerprint(48, site)
    rate_49, noise_49, drawn_49 = fingerprint(49, site)
    assert rate_48 == pytest.approx(Q, abs=0.025)
    assert rate_49 == pytest.approx(Q, abs=0.025)
    assert noise_48 == noise_49
    assert drawn_48 == drawn_49  # the same uniforms meet the same threshold


def test_the_divisor_is_not_the_number_drawn(site):
    """The noise in a step does not shrink because more patients were drawn."""
    patients = list(site.gradients)
    scales = [float((site.step(patients[:n])).std()) for n in (0, 5, 40)]
    assert scales == pytest.approx([scales[0]] * 3, rel=0.01)


def test_mutant_whose_divisor_is_the_number_drawn(site):
    patients = list(site.gradients)
    scales = [float(site.step(patients[:n], expected_patients=max(n, 1)).std()) for n in (0, 5, 40)]
    assert scales != pytest.approx([scales[0]] * 3, rel=0.01)


def test_mutant_with_the_stock_loader(site):
    """Opacus takes the batch from q times the private cohort's size: 48 and 49 are told apart at a glance."""
    _, noise_48, _ = fingerprint(48, site, expected=lambda cohort: Q * cohort)
    _, noise_49, _ = fingerprint(49, site, expected=lambda cohort: Q * cohort)
    assert noise_48 != noise_49


def test_mutant_whose_rate_depends_on_the_cohort(site):
    def fixed_batch(patients: list[str], rate: float, source: CryptoSource) -> list[str]:
        return draw_patients(patients, EXPECTED / len(patients), source)

    rate_24, _, _ = fingerprint(24, site, draw=fixed_batch)
    assert rate_24 != pytest.approx(Q, abs=0.025)


def test_an_empty_draw_looks_like_any_other(site):
    """Whether anyone was drawn must not show in the release: an empty step has the same noise, not zero."""
    assert noise_scale(site) == pytest.approx(1, rel=0.01)
    assert float(site.step(list(site.gradients)[:1]).std()) == pytest.approx(float(site.step([]).std()), rel=0.01)
