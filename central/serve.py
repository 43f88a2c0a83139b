"""`central serve`: the coordinator's processes, until told to stop.

The gateway hands out artifacts; the SuperLink keeps nodes, runs and messages; the SuperExec starts the server app of a
submitted run. The last two are Flower's own programs in process isolation, with a shared secret and SQLite state.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from central.app_bundle import CONNECTION, flower_environment, prepare_flower_home, program
from central.federation import Federation
from central.registry import SiteRegistry
from sspformer.contract.durable import read_secret, write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.supervise import Child, Supervisor, check_port_is_free, wait_for_port

FLWR_S = 15.0  # how long one of Flower's commands may take
_NUMBER = re.compile(r"SuperNode (\d+) registered")


def serve(root: Path) -> None:
    """Run the coordinator in the foreground. SIGTERM or Ctrl-C ends it and leaves no process.

    Raises:
        Refused: E-CONFIG, E-STATE, or E-PORT when a port is taken.
    """
    federation = Federation.open(root.absolute())
    config = federation.config
    check_port_is_free(config.bind, config.gateway_port, "gateway_port")
    check_port_is_free(config.superlink_bind, config.superlink_port, "superlink_port")
    read_secret(federation.superexec_secret_path, "the secret of SuperLink and SuperExec")
    federation.cover_addresses()
    prepare_flower_home(federation)
    nodes = _Nodes(federation)
    supervisor = Supervisor(federation.root / "logs", say=_say, every=nodes.settle)
    try:
        supervisor.start(_superlink(federation))
        supervisor.keep_house()
        supervisor.start(_superexec(federation))
        supervisor.start(_gateway(federation))
        print(
            f"Coordinator of {config.name} is up: gateway {config.host}:{config.gateway_port}, "
            f"SuperLink {config.host}:{config.superlink_port}, {len(nodes.known or ())} sites. Stop it with Ctrl-C.",
            flush=True,
        )
        supervisor.run()
    finally:
        supervisor.end()


def _superlink(federation: Federation) -> Child:
    config = federation.config
    return Child(
        name="superlink",
        command=[
            *(program("flower-superlink"), "--host", config.superlink_bind),
            *("--port", str(config.superlink_port)),
            *("--ssl-certfile", str(federation.server_certificate_path)),
            *("--ssl-keyfile", str(federation.server_key_path)),
            *("--ssl-ca-certfile", str(federation.ca_certificate_path)),
            *("--enable-supernode-auth", "--database", str(federation.root / "flwr" / "superlink.db")),
            *("--isolation", "process", "--superexec-auth-secret-file", str(federation.superexec_secret_path)),
            "--disable-runtime-dependency-installation",
        ],
        environment=flower_environment(federation),
        ready=wait_for_port(config.superlink_address, config.superlink_port),
    )


def _superexec(federation: Federation) -> Child:
    config = federation.config
    return Child(
        name="superexec",
        command=[
            program("flower-superexec"),
            *("--runtime-api-address", f"{config.superlink_address}:{config.superlink_port}"),
            *("--root-certificates", str(federation.ca_certificate_path)),
            *("--superexec-auth-secret-file", str(federation.superexec_secret_path)),
        ],
        environment=flower_environment(federation) | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"},
    )


def _gateway(federation: Federation) -> Child:
    return Child(
        name="gateway",
        command=[sys.executable, "-m", "central.gateway", str(federation.root)],
        environment=flower_environment(federation),
        ready=wait_for_port(federation.config.gateway_address, federation.config.gateway_port),
    )


@dataclass(frozen=True)
class _Node:
    """A site's node as the SuperLink knows it. `number` is Flower's; none, when the SuperLink knew the key before."""

    key: str
    number: int | None


@dataclass
class _Nodes:
    """Keeps the SuperLink's nodes the same as the register of sites, also while it runs.

    Args:
        federation: the coordinator.
    """

    federation: Federation
    known: dict[str, _Node] | None = None

    @property
    def _path(self) -> Path:
        return self.federation.root / "flwr" / "nodes.json"

    def settle(self) -> None:
        """Unregister the nodes of sites that were removed, then register those of sites that are new.

        One site's failure does not keep the others waiting.

        Raises:
            Refused: E-STATE, the SuperLink refused, or the register or the list of known nodes is damaged.
            subprocess.TimeoutExpired: the SuperLink does not answer.
        """
        sites = {site.name: site.node_public_key for site in SiteRegistry(self.federation.sites_path).sites()}
        if self.known is None:
            self.known = self._load()
        known, failed = self.known, []
        for name in [name for name, node in known.items() if sites.get(name) != node.key]:
            if self._unregister(known[name]):
                del known[name]
                self._save(known)
            else:
                failed.append(f"unregister site {name}")
        for name in [name for name in sites if name not in known]:
            node = self._register(name, sites[name])
            if node is not None:
                known[name] = node
                self._save(known)
            else:
                failed.append(f"register site {name}")
        if failed:
            raise Refused(
                Code.STATE,
                f"The SuperLink does not {', '.join(failed)}.",
                f"Read {self.federation.root / 'logs' / 'superlink.log'}",
            )

    def _register(self, name: str, public_key: str) -> _Node | None:
        key = self.federation.root / "flwr" / f"{name}.pub"
        write_file(key, public_key.encode())
        done = self._flwr("register", str(key), CONNECTION, "--name", name)
        if done.returncode == 0:
            number = _NUMBER.search(done.stdout)
            return _Node(public_key, int(number[1]) if number else None)
        return _Node(public_key, None) if "already" in done.stdout + done.stderr else None

    def _unregister(self, node: _Node) -> bool:
        if node.number is None:  # the server app asks registered keys only, so such a node is never asked
            return True
        done = self._flwr("unregister", str(node.number), CONNECTION)
        return done.returncode == 0 or "already deleted" in done.stdout + done.stderr

    def _flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program("flwr"), "supernode", *arguments],
            env=flower_environment(self.federation),
            capture_output=True,
            text=True,
            timeout=FLWR_S,
        )

    def _load(self) -> dict[str, _Node]:
        if not (self._path.exists() and (self.federation.root / "flwr" / "superlink.db").exists()):
            return {}
        try:
            entries = json.loads(self._path.read_bytes())
            return {str(name): _Node(str(entry["key"]), entry["number"]) for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise Refused(
                Code.STATE, f"{self._path} is damaged.", "Remove it; the sites are registered again."
            ) from None

    def _save(self, known: dict[str, _Node]) -> None:
        entries = {name: {"key": node.key, "number": node.number} for name, node in known.items()}
        write_file(self._path, json.dumps(entries, sort_keys=True).encode())


def _say(line: str) -> None:
    print(line, flush=True)
