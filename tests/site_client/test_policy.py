"""The site's caps: defaults are cautious, keys are strict, and a plan within them passes."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from site_client.policy import Policy, check, check_update_norm
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import LocalTraining, PrivateTraining, RunPlan

DIGEST = "sha256:" + "0" * 64


def private(**changes) -> PrivateTraining:
    return PrivateTraining(
        **{
            "sample_rate": 0.2,
            "expected_patients": 9.6,
            "noise_multiplier": 1.31,
            "clipping_norm": 0.5,
            "learning_rate": 3e-4,
            **changes,
        }
    )


def plan(**changes) -> RunPlan:
    return RunPlan(**{"run": "demo", "encoder": DIGEST, "head": DIGEST, "rounds": 15, "private": private(), **changes})


def test_a_plan_within_the_defaults_passes():
    check(plan(), Policy(), train_patients=48)


def test_defaults_refuse_training_without_dp_and_a_site_may_allow_it():
    with pytest.raises(Refused) as refusal:
        check(plan(private=None), Policy(), 48)
    assert refusal.value.code is Code.PLAN
    assert "require_dp" in str(refusal.value)
    check(plan(private=None), Policy(require_dp=False), 48)


def test_unlimited_epsilon_needs_dp_to_be_optional():
    with pytest.raises(ValidationError, match="max_epsilon"):
        Policy(max_epsilon=None)
    check(plan(rounds=100), Policy(max_epsilon=None, require_dp=False), 48)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_epsilons": 3},
        {"max_epsilon": 0},
        {"max_epsilon": float("nan")},
        {"min_noise_multiplier": 0},
        {"max_sample_rate": 1.5},
        {"delta": 0.5},
        {"min_patients": 1},
        {"allowed_tasks": []},
    ],
)
def test_a_policy_that_means_nothing_is_an_error(wrong):
    with pytest.raises(ValidationError):
        Policy.model_validate(wrong)


def test_a_site_with_too_few_patients_refuses_and_does_not_change_the_rate():
    half = plan().private.min_patients
    assert half == 24  # of the 48 that the plan was made for
    check(plan(), Policy(), half)
    with pytest.raises(Refused) as refusal:
        check(plan(), Policy(), half - 1)
    assert refusal.value.code is Code.COHORT
    with pytest.raises(Refused, match="at least 30"):
        check(plan(), Policy(min_patients=30), 29)
    with pytest.raises(Refused, match="at least 5"):
        check(plan(private=None), Policy(require_dp=False), 4)


def test_a_run_that_could_never_fit_the_budget_is_refused_before_its_first_round():
    check(plan(rounds=15), Policy(max_epsilon=8.0), 48)
    with pytest.raises(Refused) as refusal:
        check(plan(rounds=16), Policy(max_epsilon=8.0), 48)
    assert refusal.value.code is Code.BUDGET
    assert "8." in refusal.value.what


def test_plain_steps_are_capped_too():
    with pytest.raises(Refused, match="max_steps_per_round"):
        check(plan(private=None, local=LocalTraining(steps=201)), Policy(require_dp=False), 48)


def test_an_update_beyond_the_norm_is_kept_back():
    check_update_norm(100.0, Policy())
    for norm in (100.1, float("nan"), float("inf")):
        with pytest.raises(Refused) as refusal:
            check_update_norm(norm, Policy())
        assert refusal.value.code is Code.TENSORS
