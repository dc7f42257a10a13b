"""`ryot-deploy verify`: signatures, hashes and golden tokens of bundles and archives."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from ryot.cli.options import HELP, verbose_option


@click.command("verify", context_settings=HELP)
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="BUNDLE...")
@click.option(
    "--trusted-keys", metavar="FILE", type=click.Path(path_type=Path), help="Ask for a signature by one of these keys"
)
@click.option("--files-only", is_flag=True, help="Do not run the golden prompts")
@verbose_option
def command(paths: tuple[Path, ...], trusted_keys: Path | None, files_only: bool) -> None:
    """Check bundles or .tar.zst archives: every byte as it was made, nothing added, golden tokens equal.

    Example: ryot-deploy verify runs/first/bundle --trusted-keys trusted_keys
    """
    from ryot.edge.bundle import Bundle
    from ryot.edge.trust import check_whole, load_trusted_keys
    from ryot.scratch import scratch_folder

    keys = None if trusted_keys is None else load_trusted_keys(trusted_keys)
    for path in paths:
        with contextlib.ExitStack() as stack:
            bundle: Bundle
            if path.is_file():
                from ryot.deploy.archive import unpack_archive

                scratch = stack.enter_context(scratch_folder("verify"))
                bundle, signer = unpack_archive(path, scratch / "bundle", keys)
            else:
                bundle, signer = check_whole(path, keys)
            said = [f"{path}: {bundle.name}, {len(bundle.files)} files as in the manifest"]
            if signer is not None:
                said.append(f"signed by {signer}" + (f" ({signer.key.comment})" if signer.key.comment else ""))
            if not files_only:
                from ryot.edge.engines import open_engine
                from ryot.edge.generate import check_golden, golden_rows

                total = sum(len(golden.tokens) for golden in bundle.golden)
                compared = check_golden(open_engine(bundle, batch_size=golden_rows(bundle)))
                said.append(f"{compared} of {total} golden tokens compared and equal")
            click.echo(", ".join(said))
