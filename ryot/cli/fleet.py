"""`ryot-deploy fleet`: what devices run, and the way back."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.options import HELP, format_option, host_options, verbose_option
from ryot.cli.push import tell_host

if TYPE_CHECKING:
    from ryot.fleet.status import HostStatus


@click.group("fleet", context_settings=HELP)
def command() -> None:
    """Show what devices run, and take them back to the version before.

    Example: ryot-deploy fleet status --fleet fleet.toml
    """


@command.command("status", context_settings=HELP)
@host_options
@click.option("--check", is_flag=True, help="Compare golden tokens there now")
@format_option("table", "json")
@verbose_option
def status(
    hosts: tuple[str, ...],
    fleet: Path | None,
    ssh_config: Path | None,
    root: str | None,
    jobs: int,
    check: bool,
    fmt: str,
) -> int:
    """Show what each host runs, since when, how fast it was, and what it could return to.

    Example: ryot-deploy fleet status kitchen hall --check
    """
    from ryot.fleet.inventory import load_hosts
    from ryot.fleet.status import ask_status

    listed = load_hosts(hosts, fleet, {"root": root})
    found = ask_status(listed, ssh_config, check=check, jobs=jobs, tell=tell_host)
    if fmt == "json":
        click.echo(json.dumps({"schema": 1, "hosts": [one._asdict() for one in found]}, indent=1))
    else:
        from tabulate import tabulate

        cells = [_cells(one) for one in found]
        click.echo(tabulate(cells, headers="keys", disable_numparse=True, colalign=_align(cells[0])))
    return _complain(found)


@command.command("rollback", context_settings=HELP)
@host_options
@click.option("--restart", metavar="COMMAND", help="What makes a service there take up the version before")
@click.option("--health", metavar="COMMAND", help="What has to succeed there within 30 s for it to stay")
@verbose_option
def rollback(
    hosts: tuple[str, ...],
    fleet: Path | None,
    ssh_config: Path | None,
    root: str | None,
    jobs: int,
    **flags: object,
) -> int:
    """Return hosts to the last good version before the current one.

    Example: ryot-deploy fleet rollback kitchen
    """
    from ryot.fleet.inventory import load_hosts
    from ryot.fleet.status import roll_back

    listed = load_hosts(hosts, fleet, {"root": root, **flags})
    found = roll_back(listed, ssh_config, jobs=jobs, tell=tell_host)
    for one in found:
        if not one.error:
            click.echo(f"{one.host}: {one.answer['current']['name']} {one.answer['current']['id']}")
    return _complain(found)


def _cells(one: HostStatus) -> dict[str, str]:
    current, good = one.answer.get("current") or {}, one.answer.get("good", [])
    figures = current.get("figures", {})
    before = [release["name"] for release in good if release["id"] != current.get("id")]
    installed = current.get("installed_at")
    return {
        "host": one.host,
        "runs": " ".join(current[k] for k in ("name", "precision", "id")) if current else "-",
        "since": f"{datetime.datetime.fromtimestamp(installed):%Y-%m-%d %H:%M}" if installed else "-",
        "TTFT ms": f"{figures['ttft_ms']:.2f}" if "ttft_ms" in figures else "-",
        "tok/s": f"{figures['decode_tok_s']:.0f}" if "decode_tok_s" in figures else "-",
        "before": before[-1] if before else "-",
        "free MB": f"{one.answer['disk_free_bytes'] / 1e6:.0f}" if "disk_free_bytes" in one.answer else "-",
        "state": _state(one),
    }


def _state(one: HostStatus) -> str:
    if one.error:
        return "error"
    if one.answer["pending"]:
        return "switch not proved"
    if not one.answer["current"]:
        return "nothing runs"
    return "verified now" if "golden" in one.answer else "good"


def _align(cells: dict[str, str]) -> list[str]:
    return ["right" if name in ("TTFT ms", "tok/s", "free MB") else "left" for name in cells]


def _complain(found: list[HostStatus]) -> int:
    for one in found:
        if one.error:
            click.echo(f"{one.host}: {one.error}", err=True)
            if one.hint:
                click.echo(f"hint: {one.hint}", err=True)
    return 1 if any(one.error for one in found) else 0
