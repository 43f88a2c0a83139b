"""The coordinator's configuration: `central.yaml`."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sspformer.contract.durable import write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.joining import Host, Port
from sspformer.contract.manifest import FederationName
from sspformer.contract.settings import load_settings

_SUPERLINK_COMMENT = """\
# Where the SuperLink listens. Anyone who reaches that port can run code on this machine: a submitted run brings its own
# server app. Sites on other machines need another address than 127.0.0.1 here; then firewall superlink_port so that
# only the machines of the sites' SuperNodes reach it.
"""


class CentralConfig(BaseModel):
    """What the operator of the coordinator may set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: FederationName
    host: Host = Field(description="DNS name or IP address at which hospitals reach this machine")
    bind: Host = Field(description="address that the gateway listens on")
    gateway_port: Port
    superlink_port: Port
    superlink_bind: Host = Field("127.0.0.1", description="address that the SuperLink listens on")

    @model_validator(mode="after")
    def _two_ports(self) -> CentralConfig:
        if self.gateway_port == self.superlink_port:
            raise ValueError("gateway_port and superlink_port must differ")
        return self

    @property
    def gateway_address(self) -> str:
        """Where programs on this machine reach the gateway."""
        return _reached_at(self.bind)

    @property
    def superlink_address(self) -> str:
        """Where programs on this machine reach the SuperLink; the server's certificate must hold it."""
        return _reached_at(self.superlink_bind)

    @classmethod
    def load(cls, path: Path) -> CentralConfig:
        """Read `central.yaml`.

        Raises:
            Refused: E-CONFIG naming file, line and key.
        """
        return load_settings(path, cls)

    @classmethod
    def make(cls, *, name: str, host: str, gateway_port: int, superlink_port: int) -> CentralConfig:
        """Make a configuration from command-line options. The gateway of a loopback host listens on loopback only.

        The SuperLink always starts on loopback: whoever reaches it can run code here, so opening it is a decision
        that no command takes for the operator.

        Raises:
            Refused: E-CONFIG naming the option.
        """
        bind = "127.0.0.1" if is_loopback(host) else "0.0.0.0"  # noqa: S104 - a public host is there to be reached
        try:
            return cls(name=name, host=host, bind=bind, gateway_port=gateway_port, superlink_port=superlink_port)
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "the options"
            raise Refused(Code.CONFIG, f"{option} is refused: {first['msg']}.", "Correct it and run again.") from None

    def save(self, path: Path) -> None:
        """Write `central.yaml`."""
        settings = self.model_dump(mode="json")
        last = {"superlink_bind": settings.pop("superlink_bind")}
        text = yaml.safe_dump(settings, sort_keys=False) + _SUPERLINK_COMMENT + yaml.safe_dump(last)
        write_file(path, text.encode())


def _reached_at(bind: str) -> str:
    """Return an address that leads to a socket bound to `bind`."""
    return "127.0.0.1" if bind == "0.0.0.0" else bind  # noqa: S104


def is_loopback(host: str) -> bool:
    """Say whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
