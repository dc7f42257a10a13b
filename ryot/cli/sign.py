"""`ryot-deploy sign`: an Ed25519 signature beside a bundle's manifest, and keys to make one with."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ryot.cli.options import HELP, verbose_option


@click.command("sign", context_settings=HELP)
@click.argument("bundles", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="BUNDLE...")
@click.option("--key", metavar="FILE", type=click.Path(path_type=Path), help="Private key, in PEM")
@click.option("--new-key", metavar="FILE", type=click.Path(path_type=Path), help="Make a private key first, and use it")
@click.option(
    "--serial",
    metavar="N",
    type=click.IntRange(1, 2**53),
    help="Number of this signing: devices refuse what was signed before what they run  [default: seconds since 1970]",
)
@verbose_option
def command(bundles: tuple[Path, ...], key: Path | None, new_key: Path | None, serial: int | None) -> None:
    """Sign bundles. Prints the line that makes a device trust the key.

    The file of trusted keys, for devices and `verify`, has such lines: `trusted KEY COMMENT`, or `revoked KEY WHY`.
    A passphrase of the key is taken from RYOT_KEY_PASSPHRASE.

    Example: ryot-deploy sign runs/first/bundle --new-key owner.pem > trusted_keys
    """
    from ryot.deploy.signing import load_key, make_key, sign_bundle

    if (key is None) == (new_key is None):
        raise click.UsageError("give one of --key FILE and --new-key FILE")
    passphrase = os.environ.get("RYOT_KEY_PASSPHRASE", "")
    if new_key is not None:
        public = make_key(new_key, passphrase)
        click.echo(f"{new_key}: made; keep it off devices, and a copy of it safe", err=True)
        if not bundles:
            click.echo(f"trusted {public} {new_key.stem}")
            return
    elif not bundles:
        raise click.UsageError("give at least one bundle to sign")
    path = new_key or key
    assert path is not None
    private = load_key(path, passphrase)
    for bundle in bundles:
        public = sign_bundle(bundle, private, serial)
        click.echo(f"{bundle}: signed", err=True)
    click.echo(f"trusted {public} {path.stem}")
