"""What a run came to: one validated model, written as summary.json and read by the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sspformer.contract.durable import write_file
from sspformer.contract.errors import Code, Refused

#: Training patients below which patient-level DP costs visible image quality, and below which it leaves almost nothing.
SMALL_FOR_DP = 150
TOO_SMALL_FOR_DP = 30

#: The columns of every comparison, in the order of the page: key, short name, what it is.
METHODS: tuple[tuple[str, str, str], ...] = (
    ("input", "noisy input", "the scan as the head receives it"),
    ("nlm", "non-local means", "a classical denoiser, nothing learnt"),
    ("warm", "warm head", "the head that the coordinator published, before any round"),
    ("local", "local only", "the hospital trained alone, on its own patients"),
    ("global", "global", "the federated head, without differential privacy"),
    ("global_dp", "global, DP", "the federated head, with patient-level differential privacy"),
)

Psnr = Annotated[float, Field(ge=-20, le=200)]
Ssim = Annotated[float, Field(ge=-1, le=1)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class HistoryPoint(_Model):
    """PSNR (dB, foreground) of the global head after a round, as the site scored it; round 0 is the warm head.

    A site scores a few held-out patients in every round, so these compare with each other, not with the final scores.
    """

    round: Count
    psnr: Psnr


class SiteResult(_Model):
    """One hospital. Metrics are means over held-out patients; `*_whole_*` of whole slices, the others of the head."""

    name: str
    patients_train: Count
    patients_test: Count
    psnr_input: Psnr
    psnr_nlm: Psnr
    psnr_warm: Psnr
    psnr_local: Psnr
    psnr_global: Psnr
    psnr_global_dp: Psnr | None
    ssim_input: Ssim
    ssim_nlm: Ssim
    ssim_warm: Ssim
    ssim_local: Ssim
    ssim_global: Ssim
    ssim_global_dp: Ssim | None
    psnr_whole_input: Psnr
    psnr_whole_nlm: Psnr
    psnr_whole_warm: Psnr
    psnr_whole_local: Psnr
    psnr_whole_global: Psnr
    psnr_whole_global_dp: Psnr | None
    ssim_whole_input: Ssim
    ssim_whole_nlm: Ssim
    ssim_whole_warm: Ssim
    ssim_whole_local: Ssim
    ssim_whole_global: Ssim
    ssim_whole_global_dp: Ssim | None
    mri_bytes_stayed: Count = Field(description="bytes of the image files under the site's data folder")
    history: list[HistoryPoint] = []
    history_dp: list[HistoryPoint] = []

    def metric(self, kind: Literal["psnr", "ssim", "psnr_whole", "ssim_whole"], method: str) -> float | None:
        """Return one number of the table, None where that method did not run."""
        return getattr(self, f"{kind}_{method}")


class DpSummary(_Model):
    """The privacy statement of the DP run: its public constants, and the largest epsilon over the sites."""

    epsilon: float = Field(ge=0, description="the maximum over sites, never a mean")
    delta: float = Field(gt=0, lt=1)
    unit: Literal["patient"] = "patient"
    adjacency: str = "add or remove one patient"
    noise_multiplier: float = Field(gt=0)
    clipping_norm: float = Field(gt=0)
    sample_rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1, description="DP-SGD steps over the whole run")
    accountant: str = "PRV"


class Phase(_Model):
    """How long one part of the run took."""

    name: str
    seconds: Seconds


class Summary(_Model):
    """Everything that the report shows, and summary.json holds."""

    federation: str
    task: str = "denoise"
    noise_sigma: float = Field(gt=0, lt=1)
    data: Literal["warped", "given"] = Field(description="warped: patients made from one average brain")
    sites: list[SiteResult] = Field(min_length=1)
    rounds: int = Field(ge=1)
    rounds_dp: int = Field(0, ge=0)
    aggregation: str = "fedavg"
    seconds_per_round: list[Seconds]
    seconds_per_round_dp: list[Seconds] = []
    seconds_to_first_round: Seconds
    bytes_up_per_site_round: Count
    bytes_down_per_site_round: Count
    bytes_up_total: Count = Field(0, description="everything that all sites sent, both runs together")
    encoder_bytes: Count
    head_bytes: Count = 0
    trainable_parameters: Count
    dp: DpSummary | None
    warnings: list[str] = []
    phases: list[Phase] = []
    digests: dict[str, str] = {}
    versions: dict[str, str]


def warnings_for(summary: Summary) -> list[str]:
    """Say in plain words what a reader must know before believing the numbers."""
    lines = []
    if summary.dp is not None:
        smallest = min(summary.sites, key=lambda site: site.patients_train)
        if smallest.patients_train < TOO_SMALL_FOR_DP:
            lines.append(
                f"These cohorts are far too small for differential privacy: {smallest.name} trains on "
                f"{_patients(smallest.patients_train)}. The noise that hides one patient among so few also hides what "
                f"there is to learn, so the DP head cannot be expected to beat the warm head it started from. Use at "
                f"least {SMALL_FOR_DP} training patients per hospital."
            )
        elif smallest.patients_train < SMALL_FOR_DP:
            lines.append(
                f"These cohorts are small for differential privacy: {smallest.name} trains on "
                f"{_patients(smallest.patients_train)}. Utility suffers below {SMALL_FOR_DP}: part of the gain is paid "
                f"for privacy."
            )
    if len(summary.sites) < 3:
        lines.append(
            "With fewer than three hospitals each one can work out the other's update from the global head: only "
            "differential privacy stands between them."
        )
    if summary.data == "warped":
        lines.append(
            "These are not different people. Every patient here is one average brain (MNI152), warped and "
            "re-contrasted differently at each hospital. The run shows that the system works, not how well it would "
            "do on a clinic's patients."
        )
    if summary.data == "given":
        lines.append(
            "This page shows slices and scores of real patients, read from the hospitals' folders because all "
            "of them are on this machine; in a federation they stay at each hospital. Do not pass the page on."
        )
    if min(site.patients_test for site in summary.sites) < 5:
        lines.append("Some hospitals hold out fewer than five patients: differences below 0.1 dB mean nothing here.")
    return lines


def write_summary(summary: Summary, path: Path) -> None:
    """Write summary.json as a whole or not at all."""
    text = json.dumps(summary.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
    write_file(path, f"{text}\n".encode())


def read_summary(path: Path) -> Summary:
    """Read a summary.json.

    Raises:
        Refused: E-STATE if there is none, E-FORMAT if it is not one.
    """
    try:
        return Summary.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise Refused(Code.STATE, f"{path}: there is no summary here.", "run `make demo` first.") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        raise Refused(Code.FORMAT, f"{path}: {key}: {first['msg']}.", "run the demo again.") from None


def _patients(count: int) -> str:
    return f"{count} patient" if count == 1 else f"{count} patients"
