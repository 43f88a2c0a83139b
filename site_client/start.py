"""`site-client start`: the site's SuperNode and its worker, until told to stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from site_client.folder import SiteFolder
from sspformer.contract.durable import read_secret
from sspformer.contract.supervise import Child, Supervisor, free_port, quiet_environment, wait_for_file, wait_for_port

LOOPBACK = "127.0.0.1"
READY_FILE = "worker.ready"  # written by the worker once the site is open


def start(root: Path, worker: Sequence[str] = ("-m", "site_client.worker")) -> None:
    """Run the site in the foreground. SIGTERM or Ctrl-C ends it and leaves no process.

    The SuperNode speaks to the coordinator and never sees MRI; the worker sees MRI and speaks to the SuperNode only.

    Args:
        root: the site's folder.
        worker: how Python starts the worker; tests give a script with a trivial round.

    Raises:
        Refused: E-CONFIG or E-STATE, the site has not joined or its folder is not whole.
    """
    folder = SiteFolder.open(root)
    coordinator = folder.coordinator()
    folder.coordinator_key()
    read_secret(folder.superexec_secret_path, "the secret of SuperNode and worker")
    read_secret(folder.node_key_path, "the node's key")

    runtime_port = free_port()
    runtime = f"{LOOPBACK}:{runtime_port}"
    logs = (root / "logs").absolute()
    ready_file = root / READY_FILE
    environment = quiet_environment(FLWR_HOME=str((root / "flwr").absolute()))
    supernode = Child(
        name="supernode",
        command=[
            *(sys.executable, "-m", "site_client.supernode", str(root / "node.id")),
            *("--superlink", f"{coordinator.host}:{coordinator.superlink_port}"),
            *("--root-certificates", str(folder.ca_certificate_path)),
            *("--auth-supernode-private-key", str(folder.node_key_path)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(folder.superexec_secret_path)),
            *("--host", LOOPBACK, "--port", str(runtime_port)),
        ],
        environment=environment,
        ready=wait_for_port(LOOPBACK, runtime_port),
    )
    threads = str(folder.config.threads)
    runner = Child(
        name="worker",
        command=[sys.executable, *worker, str(root), "--runtime-api", runtime],
        environment=environment | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        ready=wait_for_file(ready_file),
        # A SuperNode waits a minute for a task whose worker died; a fresh one is asked again at once.
        takes_along=("supernode",),
    )
    supervisor = Supervisor(logs)
    try:
        ready_file.unlink(missing_ok=True)
        supervisor.start(supernode)
        supervisor.start(runner)
        print(f"Site {folder.config.name} is up. Logs: {logs}. Stop it with Ctrl-C.", flush=True)
        supervisor.run()
    finally:
        supervisor.end()
