"""`ryot-deploy generate`: text from a bundle, by the same program as the bundle's own `run.py`."""

from __future__ import annotations

from pathlib import Path

import click

from ryot.cli.options import HELP


@click.command(
    "generate",
    context_settings={**HELP, "ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="All options of the bundle's run.py: ryot-deploy generate BUNDLE --help",
)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(bundle: Path, arguments: tuple[str, ...]) -> int:
    """Stream a continuation of a prompt (or --verify the bundle) with the edge runtime alone.

    Example: ryot-deploy generate runs/first/bundle --prompt "def "
    """
    from ryot.edge.cli import run

    return run(bundle, list(arguments))
