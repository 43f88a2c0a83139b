"""A site that is removed while it trains: the round goes on without it, and the SuperLink forgets its node."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from central.app_bundle import CONNECTION, flower_environment, program
from tests.federation.stage import Stage

pytestmark = [pytest.mark.federation, pytest.mark.timeout(400)]


def listed(stage: Stage) -> dict[str, str]:
    """Status of each node that the SuperLink knows, by Flower's number."""
    done = subprocess.run(
        [program("flwr"), "supernode", "list", CONNECTION, "--format", "json", "--verbose"],
        env=flower_environment(stage.federation),
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    return {str(node["node-id"]): node["status"] for node in found["nodes"]}


def test_a_site_that_is_removed_in_a_round_is_out_of_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ["alpha", "bravo"])
    try:
        stage.serve()
        stage.start_sites(["alpha", "bravo"])
        nodes = stage.federation.root / "flwr" / "nodes.json"
        number = str(json.loads(nodes.read_text())["bravo"]["number"])
        assert listed(stage)[number] == "online"

        hold = stage.hold("bravo")
        run = stage.run(str(stage.plan("removed", rounds=1, quorum=1)), log="removed")
        stage.wait_in_round("bravo", run)
        removal = stage.launch("central.cli", "remove", str(stage.federation.root), "bravo", log="remove")
        assert stage.finish(removal, 60) == 0
        assert stage.finish(run) == 0, stage.logs()
        record = next(iter(stage.store("removed").records()))
        assert record.sites == ("alpha",)
        assert record.missing == {"bravo": "E-SIGNATURE"}
        assert record.seconds < 60  # nobody waited for the deadline
        assert "fewer than three hospitals" in stage.log("removed")

        stage.wait(lambda: "bravo" not in json.loads(nodes.read_text()), 30)
        assert listed(stage).get(number, "unregistered") == "unregistered"
        hold.unlink()
    finally:
        stage.close()
