"""`ryot-deploy slice`: a narrower model out of an elastic checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from ryot.cli.options import HELP, check_output_folder, verbose_option


@click.command("slice", context_settings=HELP)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--width", metavar="D", type=click.IntRange(min=1), required=True, help="Width (dim) to cut to, as it was trained"
)
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Checkpoint to write"
)
@verbose_option
def command(checkpoint: Path, width: int, output: Path) -> None:
    """Cut a checkpoint of an elastic training to a narrower width; prints the new checkpoint's folder.

    The recipe `elastic` trains one model and the narrower ones inside it together. What is cut out is an ordinary
    checkpoint: export, bench and generate take it like any other.

    Example: ryot-deploy slice /tmp/elastic --width 64 -o /tmp/elastic-64
    """
    check_output_folder(output)
    from ryot.optimize.compression import slice_checkpoint

    if output.exists():
        output.rmdir()
    narrow = slice_checkpoint(checkpoint, width, output)
    click.echo(f"{output.name}: dim {width}, {narrow.num_parameters:,} parameters", err=True)
    click.echo(output)
