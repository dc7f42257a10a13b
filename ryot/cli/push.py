"""`ryot-deploy push`: a bundle onto devices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.options import HELP, format_option, host_options, verbose_option
from ryot.edge.cli import BENCH_ROUNDS
from ryot.fleet.device.checks import MAX_SLOWDOWN

if TYPE_CHECKING:
    from ryot.report.table import Format


@click.command("push", context_settings=HELP)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@host_options
@click.option("--python", metavar="PATH", help="Python there, with the packages or to make an environment from")
@click.option("--target", metavar="NAME", multiple=True, help="Limits to measure under and judge by there; repeatable")
@click.option(
    "--rounds",
    metavar="N",
    type=click.IntRange(min=0),
    default=BENCH_ROUNDS,
    show_default=True,
    help="Fresh processes that measure there; 0: a moment, and no record",
)
@click.option("--offline", is_flag=True, help="Take wheels along, for devices without a package index")
@click.option(
    "--wheels",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where those wheels are  [default: pip's index]",
)
@click.option(
    "--trusted-keys",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Make the devices take only what these keys signed",
)
@click.option("--restart", metavar="COMMAND", help="What makes a service there take up the new version")
@click.option("--health", metavar="COMMAND", help="What has to succeed there within 30 s for it to stay")
@click.option(
    "--max-slowdown",
    metavar="X",
    type=click.FloatRange(min=1),
    default=MAX_SLOWDOWN,
    show_default=True,
    help="Keep the version before when the new one takes more than X times as long there",
)
@click.option("--even-if-missed", is_flag=True, help="Switch although a limit is missed, or it is slower")
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Keep the report as JSON")
@format_option("table", "md", "csv", "json")
@verbose_option
def command(
    bundle: Path,
    hosts: tuple[str, ...],
    fleet: Path | None,
    ssh_config: Path | None,
    root: str | None,
    jobs: int,
    rounds: int,
    wheels: Path | None,
    trusted_keys: Path | None,
    max_slowdown: float,
    even_if_missed: bool,
    output: Path | None,
    fmt: Format,
    **flags: object,
) -> int:
    """Copy a bundle to hosts over ssh, verify and measure it there, and switch to it when it works.

    A host keeps the version before: one that fails behind the switch returns to it by itself. Run the current one there
    with ROOT/current/run, which takes what the bundle's run.py does.

    Example: ryot-deploy push runs/first/bundle pi@kitchen.local --target pi-5
    """
    from ryot.edge.trust import load_trusted_keys
    from ryot.errors import ConfigError, worst_exit_code
    from ryot.fleet.inventory import load_hosts
    from ryot.fleet.push import PushOptions, prepare, push_all
    from ryot.fleet.records import describe_devices, join_reports
    from ryot.report.render import render
    from ryot.report.rows import save_report
    from ryot.report.targets import load_targets
    from ryot.scratch import scratch_folder

    flags["offline"] = flags["offline"] or wheels is not None
    listed = load_hosts(hosts, fleet, {"root": root, **flags})
    for host in listed:
        load_targets(host.target)
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: its folder does not exist")
    parcel = prepare(bundle, None if trusted_keys is None else load_trusted_keys(trusted_keys))
    options = PushOptions(
        rounds=rounds,
        max_slowdown=max_slowdown,
        even_if_missed=even_if_missed,
        trusted_keys=trusted_keys,
        wheels=wheels,
        ssh_config=ssh_config,
        command=" ".join(["ryot-deploy", *sys.argv[1:]]),
    )
    with scratch_folder("push") as scratch:
        results = push_all(parcel, listed, options, jobs=jobs, scratch=scratch, tell=tell_host)
    reports = [result.report for result in results if result.report is not None]
    if reports:
        report = join_reports(reports)
        click.echo(render(report, fmt))
        if output is not None:
            save_report(report, output)
        for line in describe_devices(report):
            click.echo(line, err=True)
    for result in results:
        sent = f"{result.sent_bytes / 1e6:.2f} MB sent, {result.wall_s:.1f} s"
        click.echo(f"{result.host}: {result.outcome}{': ' + result.reason if result.reason else ''} ({sent})", err=True)
        if result.hint:
            click.echo(f"hint: {result.hint}", err=True)
    return worst_exit_code([result.exit_code for result in results])


def tell_host(host: str, what: str) -> None:
    """Progress of one host, for people."""
    click.echo(f"{host}: {what}", err=True)
