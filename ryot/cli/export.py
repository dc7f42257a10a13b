"""`ryot-deploy export`: a checkpoint as bundles, gated on parity and scored on held-out text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ryot.cli.options import HELP, CommaList, cache_dir, check_output_folder, data_option, verbose_option
from ryot.config import PRECISIONS

log = logging.getLogger(__name__)


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
@click.option(
    "--kv-cache",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="Type of the key-value cache: int8 takes a quarter of the memory and reads faster at depth",
)
@data_option
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Folder for the bundles"
)
@verbose_option
@click.pass_context
def command(
    ctx: click.Context,
    checkpoint: Path,
    precisions: tuple[str, ...],
    kv_cache: Any,
    data: tuple[str, ...],
    output: Path,
) -> int:
    """Export a Hugging Face checkpoint (Llama or OPT) as one bundle a precision.

    The fp32 graph is checked against torch, the others against fp32 on held-out text: the test part of --data, by
    default of the standard library's source. Ends with exit code 4 when a form named by
    --precisions breaches its quality limit.

    Example: ryot-deploy export /tmp/checkpoint --precisions fp32,int8 -o /tmp/forms
    """
    check_output_folder(output)
    cache = cache_dir()
    from tabulate import tabulate

    from ryot.config import replace
    from ryot.deploy.export import ExportOptions, export_variant
    from ryot.deploy.forms import check_precision
    from ryot.deploy.tune import choose_inference, format_decision
    from ryot.errors import EXIT_OK, EXIT_QUALITY
    from ryot.train.checkpoint import load_tokenizer, read_model_config
    from ryot.train.corpus import load_corpus
    from ryot.train.dataset import HeldOutText

    cfg = read_model_config(checkpoint)
    for precision in precisions:
        check_precision(precision)
    text = HeldOutText(load_corpus(data), load_tokenizer(checkpoint))
    text.check_sequences(cfg.max_seq_len)
    decision = choose_inference(cfg, cache)
    log.info("%s", format_decision(decision))
    options = ExportOptions(
        name="ryot", variant=checkpoint.name, quantize=replace(decision.quantize, kv_dtype=kv_cache)
    )
    forms = export_variant(checkpoint, output, precisions, text, options=options)
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
    named = ctx.get_parameter_source("precisions") is not ParameterSource.DEFAULT
    return EXIT_QUALITY if named and not all(f.passed for f in forms) else EXIT_OK
