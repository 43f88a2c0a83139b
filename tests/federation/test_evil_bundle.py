"""A bundle with a harmful client app: nothing of it runs at our sites, all of it would at a stock one."""

from __future__ import annotations

import socket
import subprocess
import threading

import pytest

from central.app_bundle import CONNECTION, flower_environment, program
from sspformer.contract.supervise import free_port
from tests.federation.conftest import Federation
from tests.federation.evil import make_bundle
from tests.federation.stage import SITES

pytestmark = [pytest.mark.federation, pytest.mark.timeout(400)]


class Listener:
    """Counts connections to a port that harmful code is told of."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.count = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self._socket.accept()[0].close()
            except OSError:
                return
            self.count += 1

    def close(self) -> None:
        self._socket.close()


def submit(federation: Federation, out: str) -> list[str]:
    """Submit the harmful bundle as anyone could who reaches the SuperLink; give what its server app noted."""
    done = subprocess.run(
        [program("flwr"), "run", str(federation.root / "bundle"), CONNECTION, "--run-config", f'out="{out}"'],
        env=flower_environment(federation.federation),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Successfully started" in done.stdout, done.stdout + done.stderr
    result = federation.root / out
    federation.wait(result.exists, 120)
    return result.read_text().split("\n")[:-1]


def test_nothing_of_a_harmful_bundle_runs_at_a_site(federation: Federation) -> None:
    federation.start_missing_sites()
    listener = Listener()
    (federation.root / "evil-port").write_text(str(listener.port))
    make_bundle(federation.root / "bundle")
    try:
        # The sites got the message and answered it with a code.
        assert submit(federation, "locked.txt") == ["{'code': 'E-FORMAT'}"] * len(SITES)
        assert list(federation.marks().iterdir()) == []
        assert listener.count == 0
        for name in SITES:
            assert not list(federation.site(name).rglob("client.py")), "the bundle was unpacked at a site"

        # The control: the same node with Flower's own SuperExec in place of the worker.
        federation.sites["charlie"].terminate()
        assert federation.finish(federation.sites["charlie"], 20) == 0
        stock = federation.root / "marks-stock"
        stock.mkdir()
        keys = federation.site("charlie") / "keys"
        port = free_port()
        secret = ("--superexec-auth-secret-file", str(keys / "superexec.secret"))
        environment = {"EVIL_MARKS": str(stock), "FLWR_HOME": str(federation.root / "stock-home")}
        environment |= {"PATH": flower_environment(federation.federation)["PATH"]}
        node = federation.launch(
            *("--superlink", f"localhost:{federation.federation.config.superlink_port}"),
            *("--root-certificates", str(keys / "ca.pem"), "--auth-supernode-private-key", str(keys / "node.key")),
            *("--isolation", "process", "--host", "127.0.0.1", "--port", str(port), *secret),
            program=(program("flower-supernode"),),
            log="stock-node",
            **environment,
        )
        runner = federation.launch(
            *("--runtime-api-address", f"127.0.0.1:{port}", "--insecure", *secret),
            program=(program("flower-superexec"),),
            log="stock-runner",
            **environment,
        )
        federation.wait(lambda: "SuperNode ID" in federation.log("stock-node"), 30, node)
        noted = submit(federation, "stock.txt")
        assert {"imported", "called"} <= {mark.name for mark in stock.iterdir()}, federation.logs()
        assert listener.count > 0
        assert sorted(noted)[1:] == ["{'code': 'E-FORMAT'}"] * 2  # and the locked sites beside it still do not run it
        assert list(federation.marks().iterdir()) == []
    finally:
        listener.close()
    for process in (runner, node):
        process.terminate()
        process.wait(20)
    federation.start_missing_sites()
