"""The site's own curve, as written at the site and as the demo reads it back."""

from __future__ import annotations

from pathlib import Path

from central.demo.hospitals import Hospital
from central.demo.results import _history
from site_client.history import append
from sspformer.contract.plan import RunPlan

PLAN = RunPlan(run="test", encoder="sha256:" + 64 * "0", head="sha256:" + 64 * "1", rounds=3)


def test_torn_and_repeated_lines_do_not_break_the_curve(tmp_path: Path) -> None:
    path = tmp_path / "history" / "test.jsonl"
    append(path, {"round": 0, "psnr": 20.5})
    with path.open("a") as handle:
        handle.write('{"round": 1, "ps')  # killed here
    append(path, {"round": 1, "psnr": 21.5})
    append(path, {"round": 1, "psnr": 22.5})  # asked again
    with path.open("a") as handle:
        handle.write('{"round": 2')
    points = _history(Hospital("alpha", tmp_path, tmp_path), PLAN)
    assert [(point.round, point.psnr) for point in points] == [(0, 20.5), (1, 21.5)]
    assert path.stat().st_mode & 0o077 == 0
