"""A coordinator asks for more than the site allows: every ask is refused with a code, and each refusal has a mutant."""

from __future__ import annotations

import math

import pytest

from site_client import policy as policy_module
from site_client.policy import Policy
from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import PrivateTraining, RunPlan

DIGEST = "sha256:" + "0" * 64
PRIVATE = PrivateTraining(expected_patients=9.6, noise_multiplier=1.31, clipping_norm=0.5, learning_rate=3e-4)
PLAN = RunPlan(run="demo", encoder=DIGEST, head=DIGEST, rounds=15, private=PRIVATE)

# Made without validation: whatever parsing lets through, now or after a change, the policy stands on its own.
ASKS = {
    "no noise": ({"noise_multiplier": 0.0}, {}, Code.PLAN),
    "negative noise": ({"noise_multiplier": -1.31}, {}, Code.PLAN),
    "noise is not a number": ({"noise_multiplier": math.nan}, {}, Code.PLAN),
    "hardly any noise": ({"noise_multiplier": 0.01}, {}, Code.PLAN),
    "no clipping": ({"clipping_norm": 1e9}, {}, Code.PLAN),
    "infinite clipping": ({"clipping_norm": math.inf}, {}, Code.PLAN),
    "every patient in every step": ({"sample_rate": 1.0}, {}, Code.PLAN),
    "too many steps": ({"steps": 100_000}, {}, Code.PLAN),
    "a weak delta": ({"delta": 9e-3}, {}, Code.PLAN),
    "a million rounds": ({}, {"rounds": 10**6}, Code.PLAN),
    "more rounds than allowed": ({}, {"rounds": 101}, Code.PLAN),
    "another task": ({}, {"task": "reidentify"}, Code.PLAN),
    "no privacy": ({}, {"private": None}, Code.PLAN),
    "more epsilon than there is": ({}, {"rounds": 60}, Code.BUDGET),
    "a cohort this site does not have": ({"expected_patients": 200.0}, {}, Code.COHORT),
}


def ask(name: str) -> tuple[RunPlan, Code]:
    private_changes, plan_changes, code = ASKS[name]
    private = PRIVATE.model_copy(update=private_changes)
    return PLAN.model_copy(update={"private": private, **plan_changes}), code


def refused_with(plan: RunPlan) -> Code | None:
    try:
        policy_module.check(plan, Policy(), train_patients=48)
    except Refused as refusal:
        return refusal.code
    return None


@pytest.mark.parametrize("name", ASKS)
def test_the_ask_is_refused(name):
    plan, code = ask(name)
    assert refused_with(plan) is code


def test_a_refusal_is_one_line_that_names_the_key_and_the_next_step():
    with pytest.raises(Refused) as refusal:
        policy_module.check(ask("no clipping")[0], Policy(), 48)
    assert str(refusal.value) == (
        "E-PLAN: the plan's private.clipping_norm is 1e+09; this site's policy.max_clipping_norm is at most 10. "
        "Next: ask the coordinator for a plan within the policy, or change policy.max_clipping_norm in site.yaml."
    )


def test_the_plan_they_all_start_from_is_accepted():
    assert refused_with(PLAN) is None


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("hardly any noise", "_at_least"),
        ("no clipping", "_at_most"),
        ("more rounds than allowed", "_at_most"),
        ("too many steps", "_at_most"),
        ("a weak delta", "_at_most"),
        ("another task", "_refuse"),
        ("no privacy", "_refuse"),
    ],
)
def test_mutant_without_the_rule_lets_the_ask_through(monkeypatch, name, rule):
    monkeypatch.setattr(policy_module, rule, lambda *args: None)
    monkeypatch.setattr("site_client.privacy.accounting.within", lambda *args: True)
    plan, code = ask(name)
    assert refused_with(plan) is not code


def test_mutant_without_the_budget_lets_the_run_through(monkeypatch):
    monkeypatch.setattr("site_client.privacy.accounting.within", lambda *args: True)
    assert refused_with(ask("more epsilon than there is")[0]) is None


def test_mutant_without_the_cohort_rule_lets_the_run_through(monkeypatch):
    monkeypatch.setattr(PrivateTraining, "min_patients", 0)
    assert refused_with(ask("a cohort this site does not have")[0]) is None
