"""Which devices there are: hosts as `ssh` knows them, named on the command line or listed in a TOML file.

[defaults]                        # of every host
target = ["pi-5"]
restart = "systemctl --user restart ryot"
[hosts.kitchen]
ssh = "pi@kitchen.local"          # what ssh is given; the name where it is left out
[hosts.hall]
root = "/srv/ryot"
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ryot.config import build_from_mapping, check_known, load_toml, unknown
from ryot.errors import ConfigError
from ryot.mapping import Unchecked

DEFAULT_ROOT = "~/.local/share/ryot"
_NAME = re.compile(r"[\w.@:%\[\]-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A device, and how things are done there."""

    name: str = ""
    """What reports call it."""
    ssh: str = ""
    """Destination as ssh takes it: HOST, USER@HOST, or a name of its configuration; empty for `name`."""
    root: str = DEFAULT_ROOT
    """Folder on the device that holds everything."""
    python: str = ""
    """Python on the device, of an environment that has the packages or to make one from; empty: found."""
    target: tuple[str, ...] = ()
    """Limits that the bundle is measured and judged under there."""
    offline: bool = False
    """Whether wheels are taken along."""
    restart: str = ""
    """Command that makes a service there take up the version that was switched to."""
    health: str = ""
    """Command that has to succeed for a switch to stay."""
    health_wait_s: float = 30.0
    """How long it may fail before it counts."""

    def __post_init__(self) -> None:
        for field in ("name", "ssh"):
            text = getattr(self, field)
            # ssh would take a name with a dash in front for an option.
            if text and (text.startswith("-") or not _NAME.fullmatch(text)):
                raise ConfigError(f"{field}: got {text!r}, expected HOST, USER@HOST or a name of ssh's configuration")
        if not self.root or self.root.rstrip("/") in ("", "~"):
            raise ConfigError(f"root: got {self.root!r}, expected a folder of its own")

    @property
    def owner_commands(self) -> dict[str, Any]:
        """What a switch is to run, as the device takes it."""
        return {"restart": self.restart, "health": self.health, "health_wait_s": self.health_wait_s}

    @property
    def destination(self) -> str:
        return self.ssh or self.name


def load_hosts(names: Sequence[str], fleet: Path | None, flags: Unchecked) -> list[Host]:
    """The hosts that are named; of those that the file lists, all when none is named. `flags` win over the file.

    Raises `ConfigError` for a file or host that makes no sense.
    """
    listed = {} if fleet is None else _read_fleet(fleet)
    if not names and not listed:
        raise ConfigError("no host is named", hint="name hosts, or give --fleet FILE")
    chosen = list(dict.fromkeys(names)) or list(listed)
    if listed and (strange := [name for name in chosen if name not in listed]):
        raise ConfigError(f"{fleet}: " + unknown("host", strange[0], listed))
    hosts = [listed.get(name) or build_from_mapping(Host, {"name": name}, f"host {name}") for name in chosen]
    given = {key: value for key, value in flags.items() if value not in (None, (), "", False)}
    try:
        return [dataclasses.replace(host, **given) for host in hosts]
    except ConfigError as error:
        raise ConfigError(f"--{error}", hint=error.hint) from None


def _read_fleet(path: Path) -> dict[str, Host]:
    values = load_toml(path)
    check_known(values, ("defaults", "hosts"), str(path))
    defaults, hosts = values.get("defaults", {}), values.get("hosts", {})
    for table, name in ((defaults, "defaults"), (hosts, "hosts"), *((v, f"hosts.{k}") for k, v in hosts.items())):
        if not isinstance(table, Mapping):
            raise ConfigError(f"{path}: {name}: got {table!r}, expected a table")
    if not hosts:
        raise ConfigError(f"{path}: lists no host, expected tables [hosts.NAME]")
    return {
        name: build_from_mapping(Host, {**defaults, **own, "name": name}, f"{path}: hosts.{name}")
        for name, own in hosts.items()
    }
