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


class CentralConfig(BaseModel):
    """What the operator of the coordinator may set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: FederationName
    host: Host = Field(description="DNS name or IP address at which hospitals reach this machine")
    bind: Host = Field(description="address that this machine listens on")
    gateway_port: Port
    superlink_port: Port

    @model_validator(mode="after")
    def _two_ports(self) -> CentralConfig:
        if self.gateway_port == self.superlink_port:
            raise ValueError("gateway_port and superlink_port must differ")
        return self

    @classmethod
    def load(cls, path: Path) -> CentralConfig:
        """Read `central.yaml`.

        Raises:
            Refused: E-CONFIG naming file, line and key.
        """
        return load_settings(path, cls)

    @classmethod
    def make(cls, *, name: str, host: str, gateway_port: int, superlink_port: int) -> CentralConfig:
        """Make a configuration from command-line options. A loopback host listens on loopback only.

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
        write_file(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False).encode())


def is_loopback(host: str) -> bool:
    """Say whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
