"""The site's own caps. The coordinator proposes a plan, the policy caps it, and the site wins."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sspformer.contract.errors import Code, Refused
from sspformer.contract.plan import PrivateTraining, RunPlan

_Positive = Annotated[float, Field(gt=0)]


class Policy(BaseModel):
    """What this site lets any run do. The defaults are those of a cautious hospital: no training without DP.

    Lives under ``policy:`` in ``site.yaml``. A run may ask for less than a cap, never for more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    allowed_tasks: tuple[str, ...] = Field(("denoise",), min_length=1)
    max_rounds: int = Field(100, ge=1, description="rounds of one run")
    max_steps_per_round: int = Field(200, ge=1, description="optimizer steps of one round")
    min_patients: int = Field(5, ge=2, description="fewest training patients with which this site takes part")
    max_update_norm: _Positive = Field(100.0, description="largest L2 norm of an update that may leave")

    require_dp: bool = Field(True, description="refuse every plan without patient-level differential privacy")
    max_epsilon: _Positive | None = Field(
        8.0, description="per patient, over everything this site ever ran; null means no limit"
    )
    delta: float = Field(1e-5, gt=0, lt=1e-2, description="delta at which max_epsilon is meant")
    min_noise_multiplier: _Positive = 0.5
    max_clipping_norm: _Positive = 10.0
    max_sample_rate: float = Field(0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _required_dp_needs_a_budget(self) -> Policy:
        if self.require_dp and self.max_epsilon is None:
            raise ValueError(
                "max_epsilon must be a number while require_dp is true: DP without a budget protects nobody"
            )
        return self


def check(plan: RunPlan, policy: Policy, train_patients: int) -> None:
    """Holds a plan against the site's policy. The first thing done in a round, before any data is read.

    Args:
        plan: the verified plan of the run.
        policy: the site's own caps.
        train_patients: usable training patients at this site.

    Raises:
        Refused: E-PLAN where the plan asks more than the policy allows, E-BUDGET where the whole run would cost more
            epsilon than the site has ever allowed, E-COHORT where the site has too few patients. A site never changes
            the sample rate to fit its cohort: that would make the noise a function of the data.
    """
    if plan.task not in policy.allowed_tasks:
        _refuse("task", plan.task, "allowed_tasks", ", ".join(policy.allowed_tasks))
    _at_most("rounds", plan.rounds, "max_rounds", policy.max_rounds)
    if plan.private is None:
        if policy.require_dp:
            _refuse("private", "none (no differential privacy)", "require_dp", "true")
        _at_most("local.steps", plan.local.steps, "max_steps_per_round", policy.max_steps_per_round)
        needed = policy.min_patients
    else:
        _check_private(plan.private, plan.rounds, policy)
        needed = max(policy.min_patients, plan.private.min_patients)
    if train_patients < needed:
        raise Refused(
            Code.COHORT,
            f"run {plan.run} needs at least {needed} training patients and this site has {train_patients}.",
            "add patients to the site's data folder, or ask the coordinator for a plan made for smaller cohorts "
            f"(policy.min_patients here is {policy.min_patients}).",
        )


def check_update_norm(norm: float, policy: Policy) -> None:
    """Refuses an update whose L2 norm is beyond the policy, or not a number.

    Raises:
        Refused: E-TENSORS.
    """
    if not norm <= policy.max_update_norm:  # also false for NaN
        raise Refused(
            Code.TENSORS,
            f"the update's norm {norm:g} is above policy.max_update_norm {policy.max_update_norm:g}; it was kept back.",
            "lower the plan's learning rate or steps, or raise policy.max_update_norm in site.yaml.",
        )


def _check_private(private: PrivateTraining, rounds: int, policy: Policy) -> None:
    # Plan parsing refuses sigma = 0 already; a plan object made without validation must not pass here either.
    _at_least("private.noise_multiplier", private.noise_multiplier, "min_noise_multiplier", policy.min_noise_multiplier)
    _at_most("private.clipping_norm", private.clipping_norm, "max_clipping_norm", policy.max_clipping_norm)
    _at_most("private.sample_rate", private.sample_rate, "max_sample_rate", policy.max_sample_rate)
    _at_most("private.steps", private.steps, "max_steps_per_round", policy.max_steps_per_round)
    _at_most("private.delta", private.delta, "delta", policy.delta)
    if policy.max_epsilon is None:
        return
    # Imported here: the accountant brings scipy and opacus, which reading a site.yaml must not wait for.
    from site_client.privacy.accounting import epsilon, within
    from sspformer.contract.privacy import MechanismEvent

    whole_run = [MechanismEvent.of(private, rounds=rounds)]
    if not within(whole_run, policy.delta, policy.max_epsilon):
        cost = epsilon(whole_run, policy.delta)
        raise Refused(
            Code.BUDGET,
            f"the plan's {rounds} rounds would cost epsilon {cost:.2f} per patient at delta {policy.delta:g}; "
            f"policy.max_epsilon is {policy.max_epsilon:g}.",
            "ask the coordinator for more noise (private.noise_multiplier) or fewer rounds.",
        )


def _at_most(key: str, asked: float, cap_name: str, cap: float) -> None:
    if not asked <= cap:  # a NaN is refused too
        _refuse(key, f"{asked:g}", cap_name, f"at most {cap:g}")


def _at_least(key: str, asked: float, cap_name: str, cap: float) -> None:
    if not asked >= cap:
        _refuse(key, f"{asked:g}", cap_name, f"at least {cap:g}")


def _refuse(key: str, asked: str, cap_name: str, allowed: str) -> None:
    raise Refused(
        Code.PLAN,
        f"the plan's {key} is {asked}; this site's policy.{cap_name} is {allowed}.",
        f"ask the coordinator for a plan within the policy, or change policy.{cap_name} in site.yaml.",
    )
