"""The hospital's configuration: `site.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from site_client.policy import Policy
from sspformer.contract.durable import write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.joining import Host, Port, SiteName
from sspformer.contract.manifest import FederationName
from sspformer.contract.settings import load_settings

_HEADER = (
    "# This site's configuration. `policy` is the hospital's own: a run may ask for less, never for more.\n"
    "# An unknown key is an error, so that a misspelt limit cannot go unnoticed.\n"
)


class Coordinator(BaseModel):
    """Where the coordinator is. Written by `site-client accept` from the signed admission."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    federation: FederationName
    host: Host
    gateway_port: Port
    superlink_port: Port


class SiteConfig(BaseModel):
    """What the operator of the hospital's machine may set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: SiteName
    data: Path = Field(description="BIDS dataset; relative to the site's folder unless absolute")
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, le=256, description="CPU threads of the worker")
    coordinator: Coordinator | None = None
    policy: Policy = Policy()

    @classmethod
    def load(cls, path: Path) -> SiteConfig:
        """Read `site.yaml`.

        Raises:
            Refused: E-CONFIG naming file, line and key.
        """
        config = load_settings(path, cls)
        # `save` spells every limit out, so one that is missing means a damaged file, and a default in its place could
        # be looser than what the hospital had set.
        spelt = config.policy.model_fields_set if "policy" in config.model_fields_set else set()
        missing = [name for name in Policy.model_fields if name not in spelt]
        if missing:
            raise Refused(
                Code.CONFIG,
                f"{path}: key 'policy.{missing[0]}' is missing; every limit must be written out.",
                "Restore the file, or write the limit that this hospital wants.",
            )
        return config

    @classmethod
    def make(cls, *, name: str, data: Path, device: str) -> SiteConfig:
        """Make a configuration from command-line options.

        Raises:
            Refused: E-CONFIG naming the option.
        """
        try:
            return cls.model_validate({"name": name, "data": data, "device": device})
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(
                Code.CONFIG, f"--{first['loc'][0]} is refused: {first['msg']}.", "Correct it and run again."
            ) from None

    def save(self, path: Path) -> None:
        """Write `site.yaml`, every limit of the policy spelt out."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        write_file(path, (_HEADER + text).encode())
