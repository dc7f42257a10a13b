"""`ryot-deploy tune`: what this machine would choose for a shape, with the evidence."""

from __future__ import annotations

import dataclasses
import json

import click

from ryot.cli.options import HELP, cache_dir, data_option, format_option, preset_option, verbose_option


@click.command("tune", context_settings=HELP)
@click.option("--variant", metavar="NAME", default="optimized", show_default=True, help="Recipe: a name or a file")
@preset_option
@data_option
@click.option("--threads", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Threads")
@click.option(
    "--what",
    type=click.Choice(["all", "training", "inference"]),
    default="all",
    show_default=True,
    help="Which half to measure",
)
@click.option("--again", is_flag=True, help="Measure although a decision is cached")
@format_option("table", "json")
@verbose_option
def command(variant: str, preset: str, data: tuple[str, ...], threads: int, what: str, again: bool, fmt: str) -> None:
    """Time real candidates for training steps and for inference on this machine, and show what is chosen and why.

    Example: ryot-deploy tune --what inference
    """
    from ryot.cli.progress import Progress
    from ryot.config import resolve_variant
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

            with Progress() as show:
                dataset, _ = prepare_variant(recipe, load_corpus(data), cache, on_progress=show.tell_data)
            training = choose_kernels(recipe, dataset, found, threads=threads)
            decisions["training"] = dataclasses.asdict(training)
            if fmt == "table":
                click.echo(format_training(recipe.name, training))
        if what != "training":
            from ryot.deploy.tune import choose_inference
            from ryot.deploy.tune import format_decision as format_inference

            inference = choose_inference(recipe.model.spec, found, threads=threads)
            decisions["inference"] = dataclasses.asdict(inference)
            if fmt == "table":
                click.echo(format_inference(inference))
    if fmt == "json":
        click.echo(json.dumps({"schema": 1, "variant": recipe.name, **decisions}, indent=1))
