"""`ryot-deploy export`: a checkpoint as bundles, gated on parity and scored on held-out text."""

from __future__ import annotations

from pathlib import Path

import click

from ryot.cli.options import HELP, CommaList, cache_dir, check_output_folder, data_option, verbose_option
from ryot.config import PRECISIONS


@click.command("export", context_settings=HELP)
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--precisions",
    metavar="LIST",
    type=CommaList(),
    default="fp32,int8-dyn,int8,int4",
    show_default=True,
    help=f"Weight formats, separated by commas: {', '.join(PRECISIONS)}",
)
@data_option
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Folder for the bundles"
)
@verbose_option
def command(checkpoint: Path, precisions: tuple[str, ...], data: tuple[str, ...], output: Path) -> int:
    """Export a Hugging Face checkpoint (Llama or OPT) as one bundle a precision.

    The fp32 graph is checked against torch, the others against fp32 on held-out text. Ends with exit code 4 when a
    form breaches its quality limit.

    Example: ryot-deploy export /tmp/checkpoint --precisions fp32,int8 -o /tmp/forms
    """
    check_output_folder(output)
    from tabulate import tabulate

    from ryot.deploy.export import ExportOptions, export_variant
    from ryot.errors import EXIT_OK, EXIT_QUALITY, CheckpointError
    from ryot.train.checkpoint import read_model_config
    from ryot.train.corpus import load_corpus
    from ryot.train.dataset import prepare_dataset

    cfg = read_model_config(checkpoint)
    dataset, _ = prepare_dataset(load_corpus(data), cfg.vocab_size, cache_dir())
    if (checkpoint / "tokenizer.json").read_text() != (dataset.path / "tokenizer.json").read_text():
        raise CheckpointError(
            f"checkpoint {checkpoint}: its tokenizer is not the one of this corpus, so quality cannot be scored on it",
            hint="give the text the model was trained on with --data",
        )
    forms = export_variant(
        checkpoint, output, precisions, dataset, options=ExportOptions(name="ryot", variant=checkpoint.name)
    )
    rows = [
        (
            f.precision,
            f"{f.size_bytes / 1e6:.2f}",
            f"{f.quality.bpb:.4f}",
            f"{f.quality.bpb_ratio:.4f}",
            f"{f.quality.kl:.5f}",
            f"{100 * f.quality.top1:.1f}",
            "PASS" if f.passed else f"FAIL: {f.reason}",
            f.path,
        )
        for f in forms
    ]
    headers = ("precision", "MB", "bits/byte", "of fp32", "KL nats", "top-1 %", "quality", "bundle")
    click.echo(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5, "left", "left")))
    return EXIT_OK if all(f.passed for f in forms) else EXIT_QUALITY
