"""The run plan: every public constant of a run, fixed before the first round and the same for all sites."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Trainable = Literal["head", "tail", "norms"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LocalTraining(_Frozen):
    """Plain (non-private) local training of one round."""

    steps: int = Field(12, ge=1, le=10_000, description="optimizer steps per round")
    batch_slices: int = Field(4, ge=1, le=256)
    learning_rate: float = Field(1e-3, gt=0, le=1)
    trainable: Trainable = "head"


class PrivateTraining(_Frozen):
    """Patient-level DP-SGD of one round. Every number is public; none depends on a site's data."""

    sample_rate: float = Field(0.2, gt=0, le=1, description="Poisson rate q at which each patient is drawn")
    expected_patients: float = Field(gt=0, description="q times the public cohort size: the divisor of every step")
    noise_multiplier: float = Field(gt=0, description="standard deviation of the noise / clipping norm")
    clipping_norm: float = Field(gt=0)
    steps: int = Field(5, ge=1, le=1000, description="DP-SGD steps per round")
    slices_per_patient: int = Field(2, ge=1, le=64)
    learning_rate: float = Field(gt=0)
    delta: float = Field(1e-5, gt=0, lt=1e-2)
    trainable: Trainable = "tail"

    @property
    def min_patients(self) -> int:
        """Fewest training patients with which a site may take part.

        A fixed public number: expected_patients / sample_rate is the cohort that the plan was made for, and a site
        with fewer than half of it would only add noise.
        """
        return max(2, round(self.expected_patients / self.sample_rate / 2))


class RunPlan(_Frozen):
    """What the coordinator proposes. The site's policy caps it; the site wins."""

    run: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    task: Literal["denoise"] = "denoise"
    noise_sigma: float = Field(
        0.10, gt=0, lt=1, description="Rician noise of the denoising task, in units of intensity"
    )
    contrasts: tuple[str, ...] = Field(("T1w",), min_length=1, description="BIDS suffixes, in the order of preference")
    encoder: Digest
    head: Digest
    rounds: int = Field(ge=1, le=1000)
    local: LocalTraining = LocalTraining()
    private: PrivateTraining | None = None
    aggregation: Literal["fedavg", "fedadam", "fedmedian", "fedtrimmedavg", "krum"] = "fedavg"
    weights: Literal["equal", "clamped"] = "equal"
    quorum: int = Field(2, ge=1)
    max_update_norm: float = Field(
        100.0, gt=0, description="Euclidean length of a site's update beyond which the coordinator refuses it"
    )
    deadline_s: float = Field(600.0, gt=0)
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _robust_rules_need_three(self) -> RunPlan:
        if self.aggregation in ("fedmedian", "fedtrimmedavg", "krum") and self.quorum < 3:
            raise ValueError(f"aggregation {self.aggregation} needs quorum >= 3: with fewer updates it protects nobody")
        return self
