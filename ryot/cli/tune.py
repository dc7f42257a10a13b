"""`ryot-deploy tune`: what this machine would choose for a shape, with the evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.options import (
    HELP,
    cache_dir,
    data_option,
    device_option,
    format_option,
    preset_option,
    verbose_option,
)
from ryot.config import DEFAULT_RECIPE
from ryot.mapping import to_mapping

if TYPE_CHECKING:
    from ryot.config import DeviceChoice


@click.command("tune", context_settings=HELP)
@click.option("--variant", metavar="NAME", default=DEFAULT_RECIPE, show_default=True, help="Recipe: a name or a file")
@preset_option
@data_option
@click.option("--threads", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Threads")
@device_option
@click.option(
    "--what",
    type=click.Choice(["all", "training", "inference"]),
    default="all",
    show_default=True,
    help="Which half to measure",
)
@click.option(
    "--bundle",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="BUNDLE",
    help="Measure instead how many requests 'serve' and 'batch' should compute together with this bundle",
)
@click.option("--again", is_flag=True, help="Measure although a decision is cached")
@format_option("table", "json")
@verbose_option
def command(
    variant: str,
    preset: str,
    data: tuple[str, ...],
    threads: int,
    device: DeviceChoice,
    what: str,
    bundle: Path | None,
    again: bool,
    fmt: str,
) -> None:
    """Time real candidates for training steps and for inference on this machine, and show what is chosen and why.

    Example: ryot-deploy tune --what inference
    """
    if bundle is not None:
        _show_widths(bundle, threads, again, fmt)
        return
    from ryot.cli.progress import Progress
    from ryot.config import replace, resolve_variant
    from ryot.scratch import scratch_folder

    recipe = resolve_variant(variant, preset)
    cache = cache_dir()
    decisions: dict[str, object] = {}
    with scratch_folder("tune") as scratch:
        found = scratch if again else cache
        if what != "inference":
            from ryot.optimize.kernels import choose_kernels
            from ryot.optimize.kernels import format_decision as format_training
            from ryot.run.variant_data import prepare_variant
            from ryot.train.corpus import load_corpus
            from ryot.train.device import asked_device, choose_device, place_kernels

            chosen = choose_device(asked_device(recipe, device))
            recipe = replace(recipe, kernels=place_kernels(recipe, chosen, threads))
            with Progress() as show:
                dataset, _ = prepare_variant(recipe, load_corpus(data), cache, on_progress=show.tell_data)
            training = choose_kernels(recipe, dataset, found, threads=threads)
            decisions["training"] = to_mapping(training, keep_none=True)
            if fmt == "table":
                click.echo(format_training(recipe.name, training))
        if what != "training":
            from ryot.deploy.tune import choose_inference
            from ryot.deploy.tune import format_decision as format_inference

            inference = choose_inference(recipe.model.spec, found, threads=threads)
            decisions["inference"] = to_mapping(inference, keep_none=True)
            if fmt == "table":
                click.echo(format_inference(inference))
    if fmt == "json":
        click.echo(json.dumps({"schema": 1, "variant": recipe.name, **decisions}, indent=1))


def _show_widths(path: Path, threads: int, again: bool, fmt: str) -> None:
    """What a step of each width takes, and the `--rows` that `batch` takes and `serve` is to be given."""
    from tabulate import tabulate

    from ryot.edge.bundle import load_bundle
    from ryot.edge.widths import WIDTHS, choose_width
    from ryot.serve.model import ModelOptions, choose_kv_bytes
    from ryot.serve.sizing import recall_widths

    loaded = load_bundle(path)
    room = choose_kv_bytes(loaded, ModelOptions(rows=WIDTHS[-1]))
    widths = recall_widths(loaded, cache_dir(), threads=threads, kv_bytes=room, again=again).widths
    chosen = choose_width(widths)
    if fmt == "json":
        shown = [to_mapping(width, keep_none=True) for width in widths]
        click.echo(json.dumps({"schema": 1, "bundle": str(path), "widths": shown, "rows": chosen.rows}, indent=1))
        return
    table = [(width.rows, f"{width.step_ms:.3f}", f"{width.tok_s:.0f}") for width in widths]
    click.echo(tabulate(table, headers=("rows", "step ms", "tok/s"), colalign=("right",) * 3, disable_numparse=True))
    click.echo(f"--rows {chosen.rows}: wider steps bring hardly more")
