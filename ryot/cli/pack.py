"""`ryot-deploy pack`: a bundle as one file."""

from __future__ import annotations

from pathlib import Path

import click

from ryot.cli.options import HELP, verbose_option


@click.command("pack", context_settings=HELP)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="[default: NAME.tar.zst]")
@verbose_option
def command(bundle: Path, output: Path | None) -> None:
    """Pack a bundle into a .tar.zst archive, byte for byte the same each time.

    Example: ryot-deploy pack runs/first/bundle -o bundle.tar.zst
    """
    from ryot.deploy.archive import pack_bundle

    target = output or Path(f"{bundle.resolve().name}.tar.zst")
    pack_bundle(bundle, target)
    click.echo(f"{target}: {target.stat().st_size / 1e6:.2f} MB", err=True)
    click.echo(target)
