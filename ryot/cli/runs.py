"""`ryot-deploy runs`: list, show and remove run folders."""

from __future__ import annotations

from pathlib import Path

import click

from ryot.cli.options import HELP, format_option, verbose_option

_FORMAT = format_option("table", "json")


@click.group("runs", context_settings=HELP, invoke_without_command=True)
@verbose_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """List, show and remove run folders.

    Example: ryot-deploy runs list
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_command)


@command.command("list", context_settings=HELP)
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@_FORMAT
def list_command(folder: Path = Path("runs"), fmt: str = "table") -> None:
    """List the runs in FOLDER (runs), oldest first.

    Example: ryot-deploy runs list
    """
    from ryot.run.listing import format_runs, list_runs

    click.echo(format_runs(list_runs(folder), fmt))


@command.command("show", context_settings=HELP)
@click.argument("run", metavar="DIR", type=click.Path(path_type=Path))
@_FORMAT
def show_command(run: Path, fmt: str) -> None:
    """Show how far the trainings of a run are.

    Example: ryot-deploy runs show runs/20261124-203411-reference
    """
    from ryot.run.listing import format_run, read_run

    click.echo(format_run(read_run(run), fmt))


@command.command("remove", context_settings=HELP)
@click.argument("runs", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-y", "--yes", is_flag=True, help="Do not ask")
def remove_command(runs: tuple[Path, ...], yes: bool) -> None:
    """Remove runs with all their checkpoints, artifacts and bundles.

    Example: ryot-deploy runs remove --yes runs/20261124-203411-reference
    """
    from ryot.run.listing import read_run, remove_run

    for run in runs:
        size = read_run(run).size_bytes
        if yes or click.confirm(f"Remove {run} ({size / 1e6:.1f} MB)?", err=True):
            click.echo(f"{run}: {remove_run(run) / 1e6:.1f} MB freed", err=True)
