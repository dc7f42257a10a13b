"""`ryot-deploy pack`: a bundle as one file."""

from __future__ import annotations

from pathlib import Path

import click

from ryot.cli.options import HELP, verbose_option


@click.command("pack", context_settings=HELP)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="[default: NAME.tar.zst]")
@click.option("--kit", metavar="DIR", type=click.Path(path_type=Path), help="Make a kit for a device without network")
@click.option("--machine", metavar="NAME", default="aarch64", show_default=True, help="Its processor, as uname -m says")
@click.option("--python", metavar="X.Y", default="3.11", show_default=True, help="Its Python")
@click.option(
    "--wheels",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the kit's wheels are  [default: pip's index]",
)
@verbose_option
def command(
    bundle: Path, output: Path | None, kit: Path | None, machine: str, python: str, wheels: Path | None
) -> None:
    """Pack a bundle into a .tar.zst archive, byte for byte the same each time; or, with --kit, make a folder that
    installs it on a device without network: `sh DIR/install.sh` there.

    Example: ryot-deploy pack runs/first/bundle -o bundle.tar.zst
    """
    if kit is not None:
        from ryot.fleet.kit import write_kit

        if output is not None:
            raise click.UsageError("give one of -o FILE and --kit DIR")
        click.echo(write_kit(bundle, kit, machine=machine, python=python, wheels=wheels))
        return
    from ryot.deploy.archive import pack_bundle

    target = output or Path(f"{bundle.resolve().name}.tar.zst")
    pack_bundle(bundle, target)
    click.echo(f"{target}: {target.stat().st_size / 1e6:.2f} MB", err=True)
    click.echo(target)
