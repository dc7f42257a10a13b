"""`ryot-deploy export`: a model as bundles, gated on parity and scored on held-out text; or as a file for others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ryot.cli.options import HELP, CommaList, cache_dir, check_output_folder, data_option, verbose_option
from ryot.config import PRECISIONS, USUAL_PRECISIONS
from ryot.deploy.settings import ExportSettings
from ryot.edge.bundle import KV_DTYPES

if TYPE_CHECKING:
    from ryot.edge.bundle import KVDtype
    from ryot.models.sources.write_gguf import GgufKind


@click.command("export", context_settings=HELP)
@click.argument("source")
@click.option(
    "--precisions",
    metavar="LIST",
    type=CommaList(),
    default=",".join(USUAL_PRECISIONS),
    show_default=True,
    help=f"Weight formats, separated by commas: {', '.join(PRECISIONS)}",
)
@click.option(
    "--context",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help="Tokens that prompt and answer may have together  [default: as many as the model has]",
)
@click.option(
    "--target",
    "targets",
    metavar="NAME",
    multiple=True,
    help="Device that the bundles must run on: a name or a file; may be repeated  [default: this machine]",
)
@click.option(
    "--kv-cache",
    type=click.Choice(KV_DTYPES),
    default=ExportSettings().kv_dtype,
    show_default=True,
    help="Type of the key-value cache: int8 takes a quarter of the memory and reads faster at depth",
)
@click.option(
    "--to",
    "target_format",
    type=click.Choice(["bundle", "hf", "gguf"]),
    default="bundle",
    show_default=True,
    help="What to make: bundles, a Hugging Face folder, or a GGUF file",
)
@click.option(
    "--gguf-type", type=click.Choice(["F16", "Q8_0"]), default="F16", show_default=True, help="Weights of a GGUF file"
)
@data_option
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the bundles; with --to the folder or file to write",
)
@verbose_option
@click.pass_context
def command(
    ctx: click.Context,
    source: str,
    precisions: tuple[str, ...],
    context: int | None,
    targets: tuple[str, ...],
    kv_cache: KVDtype,
    target_format: str,
    gguf_type: GgufKind,
    data: tuple[str, ...],
    output: Path,
) -> int:
    """Export a model as one bundle per precision.

    SOURCE is a Hugging Face folder, a .gguf file, or org/name[@revision] of the Hugging Face hub. The float32 graph is
    checked against torch, and the reading of the model against transformers where that is installed; the others are
    scored against float32 on held-out text: the test part of --data, by default of the standard library's source.
    Ends with exit code 4 when a precision named by --precisions breaches its quality limit.

    Example: ryot-deploy export ./SmolLM2-135M-Instruct --precisions int8,int4 -o /tmp/bundles
    """
    from ryot.errors import EXIT_OK, EXIT_QUALITY
    from ryot.models.sources.naming import name_source
    from ryot.models.sources.opening import open_checkpoint

    checkpoint = open_checkpoint(source)
    if target_format == "hf":
        from ryot.models.sources.write_hf import write_hf

        write_hf(checkpoint, output)
        click.echo(output)
        return EXIT_OK
    if target_format == "gguf":
        from ryot.models.sources.write_gguf import write_gguf

        write_gguf(checkpoint, output, gguf_type)
        click.echo(output)
        return EXIT_OK

    check_output_folder(output)
    cache = cache_dir()
    from tabulate import tabulate

    from ryot.config import replace
    from ryot.deploy.artifact import ExportOptions
    from ryot.deploy.export import export_variant
    from ryot.deploy.precisions import check_precision
    from ryot.deploy.quality import MAX_BPB_RATIO
    from ryot.deploy.settings import dynamic_bits
    from ryot.deploy.text_check import open_text
    from ryot.deploy.tune import choose_inference, format_decision
    from ryot.deploy.weights import check_weights, source_spec
    from ryot.report.targets import load_targets
    from ryot.train.corpus import load_corpus

    begin = time.monotonic()

    def tell(text: str) -> None:
        click.echo(f"{time.monotonic() - begin:6.1f} s  {text}", err=True)

    for precision in precisions:
        check_precision(precision)
    devices = load_targets(targets)
    spec = source_spec(checkpoint, context)
    check_weights(checkpoint, spec)
    text = open_text(checkpoint, load_corpus(data), spec)
    tell(f"{checkpoint.where}: {spec.num_parameters / 1e6:.1f} M parameters, context {spec.max_seq_len}")
    decision = choose_inference(spec, cache)
    tell(format_decision(decision).splitlines()[0])
    bits = dynamic_bits([t.device.isa if t.device else None for t in devices] or [None])
    options = ExportOptions(
        name=name_source(source),
        variant=name_source(source),
        settings=replace(decision.settings, kv_dtype=kv_cache, dynamic_bits=bits),
        context=context,
        oracle=True,
        max_bpb_ratio=max((t.limits.get("bpb_ratio", MAX_BPB_RATIO) for t in devices), default=MAX_BPB_RATIO),
    )
    results = export_variant(checkpoint, output, precisions, text, options=options, tell=tell)
    rows = [
        (
            r.precision,
            f"{r.size_bytes / 1e6:.2f}",
            f"{r.quality.bpb:.4f}",
            f"{r.quality.bpb_ratio:.4f}",
            f"{r.quality.kl:.5f}",
            f"{100 * r.quality.top1:.1f}",
            f"{r.quality.tokens:,}",
            "PASS" if r.passed else f"FAIL: {r.reason}",
            r.path,
        )
        for r in results
    ]
    headers = ("precision", "MB", "bits/byte", "of fp32", "KL nats", "top-1 %", "tokens", "quality", "bundle")
    click.echo(tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 6, "left", "left")))
    parity, oracle = results[0].parity, results[0].oracle
    click.echo(f"Parity: logits within {parity.max_difference:.2g} of torch's (limit {parity.tolerance:.2g}).")
    if oracle.oracle:
        click.echo(f"Oracle: within {oracle.max_difference:.2g} of {oracle.oracle} (limit {oracle.tolerance:.2g}).")
    else:
        click.echo(f"Oracle: none, {oracle.reason}.")
    named = ctx.get_parameter_source("precisions") is not ParameterSource.DEFAULT
    return EXIT_QUALITY if named and not all(r.passed for r in results) else EXIT_OK
