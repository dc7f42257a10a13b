"""`ryot-deploy targets`: the contracts that artifacts are judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ryot.cli.options import HELP, format_option, verbose_option

if TYPE_CHECKING:
    from ryot.report.table import Format


@click.command("targets", context_settings=HELP)
@click.argument("names", nargs=-1)
@format_option("table", "md", "csv", "json")
@verbose_option
def command(names: tuple[str, ...], fmt: Format) -> None:
    """List the targets, or show the named ones (names or TOML files) with the source of every number.

    Example: ryot-deploy targets pi-5
    """
    from ryot.report.target_table import render_target, render_targets
    from ryot.report.targets import list_targets, load_targets

    if names and fmt == "table":
        click.echo("\n\n".join(render_target(t) for t in load_targets(names)))
    else:
        click.echo(render_targets(load_targets(names) if names else list_targets(), fmt))
