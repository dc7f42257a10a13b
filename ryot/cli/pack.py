"""`ryot-deploy pack`: a bundle as one file."""

from __future__ import annotations

import os
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
@click.option("--key", metavar="FILE", type=click.Path(path_type=Path), help="Sign what a kit holds beside its bundle")
@verbose_option
def command(
    bundle: Path,
    output: Path | None,
    kit: Path | None,
    machine: str,
    python: str,
    wheels: Path | None,
    key: Path | None,
) -> None:
    """Pack a bundle into a .tar.zst archive, byte for byte the same each time; or, with --kit, make a folder that
    installs it on a device without network: `sh DIR/install.sh` there.

    A device that trusts keys takes a kit only where the bundle (`ryot-deploy sign`) and, with --key, the rest of it are
    signed. A passphrase of the key is taken from RYOT_KEY_PASSPHRASE.

    Example: ryot-deploy pack runs/first/bundle -o bundle.tar.zst
    """
    if kit is not None:
        from ryot.fleet.kit import write_kit

        if output is not None:
            raise click.UsageError("give one of -o FILE and --kit DIR")
        sign = None
        if key is not None:
            from ryot.deploy.signing import load_key

            sign = load_key(key, os.environ.get("RYOT_KEY_PASSPHRASE", "")).sign
        click.echo(write_kit(bundle, kit, machine=machine, python=python, wheels=wheels, sign=sign))
        return
    if key is not None:
        raise click.UsageError("--key signs a kit: give --kit DIR, or sign the bundle with 'ryot-deploy sign'")
    from ryot.deploy.archive import pack_bundle

    target = output or Path(f"{bundle.resolve().name}.tar.zst")
    pack_bundle(bundle, target)
    click.echo(f"{target}: {target.stat().st_size / 1e6:.2f} MB", err=True)
    click.echo(target)
