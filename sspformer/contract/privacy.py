"""Privacy facts as immutable records. An epsilon is computed from them, never stored: epsilons do not add up."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sspformer.contract.canonical import canonical_bytes
from sspformer.contract.plan import PrivateTraining


class MechanismEvent(BaseModel):
    """What was done to the patients' data: `steps` releases of the Poisson-subsampled Gaussian mechanism.

    The accountant needs `sample_rate`, `noise_multiplier` and `steps`; the rest says what those numbers protect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sample_rate: float = Field(gt=0, le=1, description="probability q with which each patient enters a step")
    noise_multiplier: float = Field(gt=0, description="standard deviation of the noise / clipping norm")
    steps: int = Field(ge=1)
    clipping_norm: float = Field(gt=0, description="L2 bound on one patient's contribution to one step")
    unit: Literal["patient"] = "patient"
    adjacency: Literal["add-remove"] = "add-remove"

    @classmethod
    def of(cls, private: PrivateTraining, rounds: int = 1) -> MechanismEvent:
        """The event of `rounds` whole rounds of a plan's private training."""
        return cls(
            sample_rate=private.sample_rate,
            noise_multiplier=private.noise_multiplier,
            steps=private.steps * rounds,
            clipping_norm=private.clipping_norm,
        )

    def canonical(self) -> bytes:
        """Canonical JSON: equal events give equal bytes, on any machine."""
        return canonical_bytes(self.model_dump(mode="json"))
