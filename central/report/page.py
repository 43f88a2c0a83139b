"""The report of a run: one self-contained HTML page without scripts. Start reading at `write_report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from central.report import charts
from central.report.summary import METHODS, SiteResult, Summary
from sspformer.contract.durable import write_secret

#: What the slices of one hospital are called in its pictures file, in the order of the page.
PICTURES: tuple[tuple[str, str], ...] = (
    ("target", "reference"),
    ("input", "noisy input"),
    ("nlm", "non-local means"),
    ("warm", "warm head"),
    ("local", "local only"),
    ("global", "global"),
    ("global_dp", "global, DP"),
)

Pictures = Mapping[str, Mapping[str, np.ndarray]]


def write_report(summary: Summary, pictures: Pictures, path: Path) -> None:
    """Write report.html as a whole or not at all.

    Args:
        summary: the numbers.
        pictures: per site, slices_HW in [0, 1] by the keys of `PICTURES`; a missing one is left out.
        path: where the page goes.
    """
    # For its owner alone: on real data the page shows patients' slices.
    write_secret(path, render(summary, pictures).encode())


def render(summary: Summary, pictures: Pictures) -> str:
    """Render the page."""
    environment = Environment(
        loader=PackageLoader("central.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = charts.readable_bytes
    environment.filters["small"] = _small
    limits = charts.curve_limits(summary.sites)
    rows = traffic(summary)
    return environment.get_template("report.html.j2").render(
        summary=summary,
        methods=METHODS,
        headline=headline(summary),
        story=story(summary),
        tables=[
            ("Inside the head", "psnr", "ssim"),
            ("Whole slice, background included", "psnr_whole", "ssim_whole"),
        ],
        quality=[charts.quality_chart(summary, width) for width in (charts.WIDE, charts.NARROW)],
        curves=[(site, charts.curve_chart(site, limits)) for site in summary.sites],
        slices=[(site, _panels(site, pictures[site.name])) for site in summary.sites if site.name in pictures],
        error_scale=charts.ERROR_SCALE,
        traffic=rows,
        traffic_chart=[charts.bytes_chart([row[:3] for row in rows], width) for width in (charts.WIDE, charts.NARROW)],
    )


def headline(summary: Summary) -> str:
    """Say in one line whether the hospitals gained."""
    gained = [site for site in summary.sites if site.psnr_global > max(site.psnr_input, site.psnr_warm)]
    count = len(summary.sites)
    if len(gained) == count:
        return "Every hospital gained."
    if not gained:
        return "No hospital gained."
    return f"{len(gained)} of {count} hospitals gained."


def story(summary: Summary) -> list[str]:
    """Say in plain sentences what the run came to."""
    sites = summary.sites
    over_input = [site.psnr_global - site.psnr_input for site in sites]
    over_warm = [site.psnr_global - site.psnr_warm for site in sites]
    over_local = [site.psnr_global - site.psnr_local for site in sites]
    lines = [
        f"On patients that no training saw, the shared head makes noisy scans {_span(over_input)} dB cleaner (PSNR "
        f"inside the head): {_signed(over_warm)} dB against the head it started from, {_signed(over_local)} dB against "
        f"what each hospital reaches alone.",
    ]
    private = [site.psnr_global_dp - site.psnr_warm for site in sites if site.psnr_global_dp is not None]
    if summary.dp is not None and private:
        lines.append(
            f"With patient-level differential privacy at ε = {summary.dp.epsilon:.2f} it is {_signed(private)} dB "
            f"against the head it started from."
        )
    stayed = sum(site.mri_bytes_stayed for site in sites)
    lines.append(
        f"{charts.readable_bytes(stayed)} of MRI stayed where they were. Each hospital sent "
        f"{charts.readable_bytes(summary.bytes_up_per_site_round)} a round: how the weights of its head changed."
    )
    return lines


def traffic(summary: Summary) -> list[tuple[str, int, bool, str]]:
    """List what moved and what stayed: name, bytes, whether it left a hospital, what it is."""
    rounds = summary.rounds + summary.rounds_dp
    count = len(summary.sites)
    stayed = sum(site.mri_bytes_stayed for site in summary.sites)
    return [
        ("MRI that stayed", stayed, False, f"image files at {count} hospitals; no message carries any of them"),
        ("encoder, received once", summary.encoder_bytes, False, "per hospital; verified by digest and signature"),
        ("head, received a round", summary.bytes_down_per_site_round, False, "per hospital and round"),
        (
            "update, sent a round",
            summary.bytes_up_per_site_round,
            True,
            "per hospital and round, without DP; float16 differences, compressed",
        ),
        ("all updates sent", summary.bytes_up_total, True, f"{count} hospitals, {rounds} rounds, both runs together"),
    ]


def _panels(site: SiteResult, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Turn one hospital's slices into picture panels, cropped to the head."""
    # Slices come with the first axis to the left ear or the like; turned, the front of the head is up.
    arrays = {key: np.rot90(value) for key, value in arrays.items()}
    target_HW = arrays["target"]
    crop = _head_box(target_HW)
    panels = []
    for key, name in PICTURES:
        if key not in arrays:
            continue
        image_HW = arrays[key][crop]
        panels.append(
            {
                "name": name,
                "image": charts.slice_png(image_HW),
                "error": None if key == "target" else charts.error_png(image_HW, target_HW[crop]),
                "psnr": None if key == "target" else _slice_psnr(arrays[key], target_HW),
            }
        )
    return panels


def _head_box(target_HW: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns that hold tissue, with a small margin."""
    tissue = target_HW > 0.05
    if not tissue.any():
        return slice(None), slice(None)
    box = []
    for axis, size in ((1, target_HW.shape[0]), (0, target_HW.shape[1])):
        inside = np.flatnonzero(tissue.any(axis=axis))
        box.append(slice(max(0, int(inside[0]) - 6), min(size, int(inside[-1]) + 7)))
    return box[0], box[1]


def _slice_psnr(image_HW: np.ndarray, target_HW: np.ndarray) -> float:
    error = np.mean((image_HW.astype(np.float64) - target_HW.astype(np.float64)) ** 2)
    return float(-10 * np.log10(max(error, 1e-12)))


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _signed(values: list[float]) -> str:
    low, high = (f"{value:+.2f}".replace("-", "−") for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _small(value: float) -> str:
    """Write a small probability without an exponent: 0.00001."""
    return np.format_float_positional(value, trim="-")
