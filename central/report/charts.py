"""The pictures of the report, as data URIs: SVG for curves and bars, PNG for slices. No display, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from central.report.summary import METHODS, HistoryPoint, SiteResult, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RULE = "#1b2430", "#5b6673", "#d5dbe1"
#: Colours that stay apart in greyscale and for colour-blind readers; the marker repeats the difference.
LOOK: Mapping[str, tuple[str, str]] = {
    "input": ("#9aa5b1", "o"),
    "nlm": ("#8a6d3b", "s"),
    "warm": ("#5b6673", "D"),
    "local": ("#c2570c", "^"),
    "global": ("#0b5cad", "o"),
    "global_dp": ("#7a3e9d", "v"),
}
#: Widths of a chart, inches: for a desk or paper, and for a phone.
WIDE, NARROW = 7.2, 4.2
#: Absolute error at which the error maps saturate, in units of normalised intensity.
ERROR_SCALE = 0.15


def quality_chart(summary: Summary, width: float = WIDE) -> str:
    """Draw PSNR of every method at every hospital: one row a hospital, one mark a method."""
    with _style():
        figure = Figure(figsize=(width, 1.2 + 0.62 * len(summary.sites)), layout="constrained")
        axes = figure.subplots()
        for row, site in enumerate(summary.sites):
            values = {key: site.metric("psnr", key) for key, _, _ in METHODS}
            known = [value for value in values.values() if value is not None]
            axes.plot([min(known), max(known)], [row, row], color=RULE, linewidth=5, solid_capstyle="round", zorder=1)
            for key, value in values.items():
                if value is not None:
                    colour, marker = LOOK[key]
                    axes.plot(value, row, marker, color=colour, markersize=8, markeredgecolor="white", zorder=2)
        for key, name, _ in METHODS:
            colour, marker = LOOK[key]
            axes.plot([], [], marker, color=colour, markersize=8, markeredgecolor="white", label=name)
        axes.set_yticks(range(len(summary.sites)), [site.name for site in summary.sites])
        axes.set_ylim(len(summary.sites) - 0.5, -0.5)
        axes.set_xlabel("PSNR inside the head, dB (more is better)")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        figure.legend(
            loc="outside upper center",
            ncols=3 if width == WIDE else 2,
            frameon=False,
            handletextpad=0.2,
            columnspacing=1.4,
        )
        return _svg(figure, "quality")


def curve_chart(site: SiteResult, limits: tuple[float, float]) -> str:
    """Draw one hospital's learning curves: what every round of the global head gained over the warm head."""
    with _style():
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.subplots()
        alone = site.psnr_local - site.psnr_warm
        axes.axhline(0, color=LOOK["warm"][0], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.axhline(alone, color=LOOK["local"][0], linewidth=1.2, linestyle=(0, (1, 2)))
        ends = [(0.0, "warm", "warm"), (alone, "local only", "local")]
        for points, key, name in ((site.history, "global", "global"), (site.history_dp, "global_dp", "global, DP")):
            if points:
                colour, marker = LOOK[key]
                gains = _gains(points)
                rounds = [point.round for point in points]
                axes.plot(rounds, gains, marker=marker, markersize=3.5, color=colour, linewidth=1.8)
                ends.append((gains[-1], name, key))
        axes.set_ylim(*limits)
        _label_ends(axes, ends)
        axes.set_title(site.name, loc="left", fontweight="bold")
        axes.set_xlabel("round")
        axes.set_ylabel("gain over the warm head, dB")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        return _svg(figure, f"curve-{site.name}")


def curve_limits(sites: Sequence[SiteResult]) -> tuple[float, float]:
    """Return one range of gains for all curves, so that hospitals can be compared by eye."""
    values = [0.0, *(site.psnr_local - site.psnr_warm for site in sites)]
    values += [gain for site in sites for points in (site.history, site.history_dp) for gain in _gains(points)]
    margin = max(0.05, 0.08 * (max(values) - min(values)))
    return min(values) - margin, max(values) + margin


def bytes_chart(bars: Sequence[tuple[str, int, bool]], width: float = WIDE) -> str:
    """Draw amounts of data on a logarithmic scale.

    Args:
        bars: name, bytes, and whether these bytes left a hospital.
        width: inches; `NARROW` for a phone.
    """
    with _style():
        figure = Figure(figsize=(width, 0.8 + 0.42 * len(bars)), layout="constrained")
        axes = figure.subplots()
        for row, (_, amount, left) in enumerate(bars):
            axes.barh(row, max(amount, 1), color="#c2570c" if left else "#2f6f4f", height=0.62)
            axes.text(max(amount, 1) * 1.15, row, readable_bytes(amount), va="center", color=INK)
        axes.set_xscale("log")
        largest = max(amount for _, amount, _ in bars)
        axes.set_xlim(1_000, largest * 12)
        step = 1 if width == WIDE else 3
        ticks = [10**power for power in range(3, 13, step) if 10**power <= largest * 12]
        axes.set_xticks(ticks, [readable_bytes(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("each step of the scale is ten times as much")
        return _svg(figure, "bytes")


def slice_png(image_HW: np.ndarray) -> str:
    """Encode one slice in [0, 1] as a grey PNG."""
    return _png(np.clip(np.nan_to_num(image_HW), 0, 1), "gray")


def error_png(image_HW: np.ndarray, clean_HW: np.ndarray) -> str:
    """Encode the absolute error of a slice; black is none, white is `ERROR_SCALE` or more."""
    error = np.abs(np.nan_to_num(image_HW) - np.nan_to_num(clean_HW)) / ERROR_SCALE
    return _png(np.clip(error, 0, 1), "inferno")


def readable_bytes(amount: float) -> str:
    """Say an amount of data in decimal units, to three digits at most."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def _gains(points: Sequence[HistoryPoint]) -> list[float]:
    return [point.psnr - points[0].psnr for point in points]


@contextmanager
def _style() -> Iterator[None]:
    settings = {
        "font.size": 10,
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "svg.fonttype": "path",
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": INK,
    }
    with mpl.rc_context(settings):
        yield


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each line's name at its right end, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.085
    placed: list[float] = []
    for value, name, key in sorted(ends):
        height = max(value, placed[-1] + gap) if placed else value
        placed.append(height)
        axes.annotate(
            name,
            (1.02, (height - low) / (high - low)),
            xycoords="axes fraction",
            va="center",
            fontsize=9,
            color=LOOK[key][0],
        )


def _svg(figure: Figure, salt: str) -> str:
    target = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", target.getvalue())


def _png(image_HW: np.ndarray, colours: str) -> str:
    pixels = mpl.colormaps[colours](image_HW, bytes=True)[..., :3]
    target = io.BytesIO()
    mpl.image.imsave(target, np.ascontiguousarray(pixels), format="png")
    return _uri("image/png", target.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
