"""`ryot-deploy unpack`: an archive back to a folder, with nothing in it taken on trust."""

from __future__ import annotations

from pathlib import Path

import click

from ryot.cli.options import HELP, verbose_option


@click.command("unpack", context_settings=HELP)
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", metavar="DIR", required=True, type=click.Path(path_type=Path), help="New folder")
@click.option(
    "--trusted-keys", metavar="FILE", type=click.Path(path_type=Path), help="Ask for a signature by one of these keys"
)
@verbose_option
def command(archive: Path, output: Path, trusted_keys: Path | None) -> None:
    """Unpack a .tar.zst archive to a new folder, whole and verified or not at all.

    Example: ryot-deploy unpack bundle.tar.zst -o bundle --trusted-keys trusted_keys
    """
    from ryot.deploy.archive import unpack_archive
    from ryot.edge.trust import load_trusted_keys

    keys = None if trusted_keys is None else load_trusted_keys(trusted_keys)
    bundle, signer = unpack_archive(archive, output, keys)
    click.echo(f"{output}: {bundle.name}, {len(bundle.files)} files" + (f", signed by {signer}" if signer else ""))
