"""The report: numbers a reader can trust, warnings in plain words, one page without scripts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from central.report.page import headline, render, story, traffic, write_report
from central.report.summary import (
    METHODS,
    DpSummary,
    HistoryPoint,
    SiteResult,
    Summary,
    read_summary,
    warnings_for,
    write_summary,
)
from sspformer.contract.errors import Refused

SHOWN_KEYS = {
    "sites",
    "rounds",
    "seconds_per_round",
    "seconds_to_first_round",
    "bytes_up_per_site_round",
    "bytes_down_per_site_round",
    "encoder_bytes",
    "trainable_parameters",
    "dp",
    "versions",
}
SITE_KEYS = {"name", "patients_train", "patients_test"} | {
    f"{kind}_{key}" for kind in ("psnr", "ssim") for key, _, _ in METHODS
}
DP_KEYS = {"epsilon", "delta", "unit", "noise_multiplier", "clipping_norm", "sample_rate", "steps"}


def site(name: str = "north", patients: int = 200, gain: float = 6.0) -> SiteResult:
    """One hospital whose global head gains `gain` dB over the input."""
    psnr = {"input": 20.0, "nlm": 24.5, "warm": 25.0, "local": 25.9, "global": 20.0 + gain, "global_dp": 25.4}
    numbers = {f"psnr_{key}": value for key, value in psnr.items()}
    numbers |= {f"psnr_whole_{key}": value + 1 for key, value in psnr.items()}
    numbers |= {f"ssim_{key}": value / 30 for key, value in psnr.items()}
    numbers |= {f"ssim_whole_{key}": value / 40 for key, value in psnr.items()}
    curve = [HistoryPoint(round=number, psnr=25.0 + 0.2 * number) for number in range(4)]
    return SiteResult(
        name=name,
        patients_train=patients,
        patients_test=12,
        mri_bytes_stayed=10**8,
        history=curve,
        history_dp=curve,
        **numbers,
    )


def summary(*sites: SiteResult, **changes: Any) -> Summary:
    """A run of ten rounds over `sites`."""
    fields: dict[str, Any] = {
        "federation": "demo",
        "noise_sigma": 0.1,
        "data": "given",
        "sites": list(sites) or [site("north"), site("east"), site("west")],
        "rounds": 10,
        "rounds_dp": 15,
        "seconds_per_round": [4.0] * 10,
        "seconds_to_first_round": 30.0,
        "bytes_up_per_site_round": 1_400_000,
        "bytes_down_per_site_round": 1_500_000,
        "bytes_up_total": 1_400_000 * 25 * 3,
        "encoder_bytes": 5_000_000,
        "trainable_parameters": 900_000,
        "dp": DpSummary(epsilon=7.9, delta=1e-5, noise_multiplier=1.31, clipping_norm=0.5, sample_rate=0.2, steps=75),
        "versions": {"torch": "2.13.0"},
    }
    return Summary(**(fields | changes))


def pictures(*names: str) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    target_HW = np.zeros((64, 64))
    target_HW[12:52, 16:48] = 0.7
    noisy = {key: np.clip(target_HW + rng.normal(0, 0.1, target_HW.shape), 0, 1) for key, _, _ in METHODS}
    return {name: {"target": target_HW, **noisy} for name in names}


def test_summary_has_the_promised_keys_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(summary(), path)
    written = json.loads(path.read_text())
    assert set(written) >= SHOWN_KEYS
    assert set(written["sites"][0]) >= SITE_KEYS
    assert set(written["dp"]) >= DP_KEYS
    assert read_summary(path) == summary()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["{", "{}", '{"sites": []}'])
def test_broken_summary_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(Refused, match="E-FORMAT") as refusal:
        read_summary(path)
    assert "\n" not in str(refusal.value)


def test_missing_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="E-STATE"):
        read_summary(tmp_path / "summary.json")


def test_epsilon_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        DpSummary(epsilon=float("nan"), delta=1e-5, noise_multiplier=1, clipping_norm=1, sample_rate=0.2, steps=1)


@pytest.mark.parametrize(
    ("patients", "words"),
    [(200, None), (149, "small for differential privacy"), (8, "far too small for differential privacy")],
)
def test_small_cohorts_are_warned_about(patients: int, words: str | None) -> None:
    lines = " ".join(warnings_for(summary(site("a"), site("b", patients), site("c"))))
    assert ("differential privacy" in lines) == (words is not None)
    assert words is None or (words in lines and "b trains on" in lines)


def test_no_dp_no_warning_about_it() -> None:
    lines = warnings_for(summary(site("a", 8), site("b", 8), site("c", 8), dp=None))
    assert not any("differential privacy" in line for line in lines)


def test_two_hospitals_are_warned() -> None:
    assert "fewer than three hospitals" in " ".join(warnings_for(summary(site("a"), site("b"))))


def test_a_page_with_real_patients_says_so_and_is_for_its_owner(tmp_path: Path) -> None:
    assert "real patients" in " ".join(warnings_for(summary(data="given")))
    assert "real patients" not in " ".join(warnings_for(summary(data="warped")))
    path = tmp_path / "report.html"
    write_report(summary(), {}, path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_warped_patients_are_named_as_such() -> None:
    assert "not different people" in " ".join(warnings_for(summary(data="warped")))


@pytest.mark.parametrize(("gains", "words"), [((6, 6, 6), "Every"), ((6, 6, 1), "2 of 3"), ((1, 1, 1), "No hospital")])
def test_headline_claims_only_what_happened(gains: tuple[float, ...], words: str) -> None:
    assert words in headline(summary(*(site(f"s{i}", gain=gain) for i, gain in enumerate(gains))))


def test_story_says_a_loss_as_a_loss() -> None:
    assert "−1.00" in story(summary(site(gain=4.0), site("b", gain=4.0), site("c", gain=4.0)))[0]


def test_traffic_shows_everything_that_was_sent() -> None:
    rows = {name: amount for name, amount, _, _ in traffic(summary())}
    assert rows["all updates sent"] == 1_400_000 * 25 * 3
    assert rows["MRI that stayed"] == 3 * 10**8


def test_page_is_self_contained_and_script_free(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    run = summary(data="warped")
    run.warnings = warnings_for(run)
    write_report(run, pictures("north", "east", "west"), path)
    page = path.read_text()
    assert not re.search(r"<script|javascript:|\son\w+=|https?://", page, flags=re.I)
    assert all(uri.startswith("data:") for uri in re.findall(r'(?:src|srcset|href)="([^"]*)"', page))
    images = re.findall(r"<img [^>]*>", page)
    assert images
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in images)
    assert "not different people" in page
    assert page.count('class="best"') == 6
    assert list(tmp_path.iterdir()) == [path]


def test_page_escapes_names() -> None:
    page = render(summary(site("<b>x</b>"), federation="<script>alert(1)</script>"), {})
    assert "<script>" not in page
    assert "<b>x</b>" not in page


def test_page_shows_the_largest_epsilon_and_a_run_without_dp() -> None:
    assert "ε = 7.90" in render(summary(), {})
    assert "maximum over the hospitals" in render(summary(), {})
    plain = [part.model_copy(update={"psnr_global_dp": None}) for part in summary().sites]
    assert "No differential privacy was used" in render(summary(*plain, dp=None, rounds_dp=0), {})


def test_page_makes_no_forbidden_claim() -> None:
    page = re.sub(r"data:[^\"]*", "", render(summary(), pictures("north"))).lower()
    for word in ("anonymous", "compliant", "nothing leaves", "cannot be reconstructed", "tamper-proof"):
        assert word not in page


def test_page_opens_in_a_browser(tmp_path: Path) -> None:
    """Lay the page out in a real browser, at the width of a phone and of a desk: no sideways scrolling, all drawn."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine: install it to see the report laid out")
    page = tmp_path / "report.html"
    write_report(summary(), pictures("north", "east", "west"), page)
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"""<iframe id="page" src="{page.as_uri()}" style="border:0"></iframe><pre id="out"></pre><script>
        const frame = document.getElementById("page"), found = [];
        frame.onload = () => {{
          for (const width of [375, 1200]) {{
            frame.style.width = width + "px";
            const inside = frame.contentDocument;
            const images = [...inside.images];
            found.push([width, inside.documentElement.scrollWidth, images.length,
                        images.filter(image => image.complete && image.naturalWidth > 0).length]);
          }}
          document.getElementById("out").textContent = JSON.stringify(found);
        }};</script>"""
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=9000",
    ]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = json.loads(re.search(r'<pre id="out">(.*?)</pre>', dom).group(1))
    for width, laid_out, images, drawn in found:
        assert laid_out <= width
        assert images == drawn > 20
