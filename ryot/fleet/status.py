"""What devices run, and the way back to the version before."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ryot.errors import FleetError
from ryot.fleet.answers import Nothing, Opened, RolledBack, Status
from ryot.fleet.connection import Connection, ConnectionLost, Links, connect
from ryot.fleet.inventory import Host
from ryot.fleet.push import describe_failure, for_each, whoami


class HostStatus(NamedTuple):
    """A device's answer, or why there is none."""

    host: str
    answer: dict[str, Any]
    error: str = ""
    hint: str | None = None


Tell = Callable[[str, str], None]


def ask_status(
    hosts: Sequence[Host], ssh_config: Path | None, *, check: bool, jobs: int, tell: Tell
) -> list[HostStatus]:
    """What each device runs; with `check` its golden tokens are compared now."""

    def ask(host: Host, device: Connection) -> dict[str, Any]:
        device.start(Nothing, op="look", root=host.root)
        return {**device.ask(Status, op="status", check=check)}

    return _each(hosts, ssh_config, ask, jobs, tell)


def roll_back(hosts: Sequence[Host], ssh_config: Path | None, *, jobs: int, tell: Tell) -> list[HostStatus]:
    """Return each device to the last good version before the current one."""

    def ask(host: Host, device: Connection) -> dict[str, Any]:
        device.start(Opened, op="push", root=host.root, session=secrets.token_hex(16), who=whoami())
        try:
            return {**device.ask(RolledBack, op="rollback", **host.owner_commands)}
        except ConnectionLost as error:
            # It may have switched, and proves that without the desk; a second one would go back further.
            raise FleetError(
                str(error), hint="see what runs there before anything else: ryot-deploy fleet status"
            ) from error

    return _each(hosts, ssh_config, ask, jobs, tell)


def _each(
    hosts: Sequence[Host],
    ssh_config: Path | None,
    ask: Callable[[Host, Connection], dict[str, Any]],
    jobs: int,
    tell: Tell,
) -> list[HostStatus]:
    def one(host: Host, links: Links) -> HostStatus:
        try:
            with connect(host, ssh_config, links, lambda what: tell(host.name, what)) as device:
                if not device.facts.python:
                    return HostStatus(host.name, {}, "it has no Python 3.11 or later")
                return HostStatus(host.name, ask(host, device))
        except Exception as error:  # a host's top loop, as that of a push
            return HostStatus(host.name, {}, *describe_failure(host, error))

    return for_each(hosts, jobs, one)
