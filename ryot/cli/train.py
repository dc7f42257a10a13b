"""`ryot-deploy train`: one variant in this process, without a cluster."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.options import (
    HELP,
    cache_dir,
    check_output_folder,
    data_option,
    device_option,
    preset_option,
    verbose_option,
)
from ryot.config import CHECKPOINT_EVERY_S, DEFAULT_RECIPE

if TYPE_CHECKING:
    from ryot.config import DeviceChoice

#: How often a signal is looked for.
CHUNK_S = 1.0


@click.command("train", context_settings=HELP)
@click.option("--variant", metavar="NAME", default=DEFAULT_RECIPE, show_default=True, help="Recipe: a name or a file")
@preset_option
@click.option("--init", metavar="SOURCE", help="Model that a recipe with [init] starts from: folder, .gguf, org/name")
@data_option
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of weights and data order")
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help="Training budget  [default: the recipe's]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of a step")
@device_option
@click.option("--no-tune", is_flag=True, help="Keep the recipe's kernels instead of measuring on this machine")
@click.option("--resume", metavar="DIR", type=click.Path(path_type=Path), help="Go on from this checkpoint")
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Checkpoint to write"
)
@verbose_option
def command(
    variant: str,
    preset: str,
    init: str | None,
    data: tuple[str, ...],
    seed: int,
    tokens: int | None,
    threads: int,
    device: DeviceChoice,
    no_tune: bool,
    resume: Path | None,
    output: Path,
) -> None:
    """Train one variant in this process and write a checkpoint in Hugging Face layout.

    Prints the checkpoint's folder. Ctrl-C stops within a second or a step and writes what there is. On the way a
    checkpoint is kept beside it every 30 seconds, which is what a safety gate or a crash leaves.

    Example: ryot-deploy train --variant optimized --tokens 40960 -o /tmp/checkpoint
    """
    check_output_folder(output)
    from ryot.cli.progress import Progress
    from ryot.config import replace, resolve_variant
    from ryot.errors import Interrupted, RyotError
    from ryot.run.signals import StopSignals

    recipe = resolve_variant(variant, preset, tokens=tokens, init=init)

    from ryot.train.device import asked_device, choose_device, place_kernels

    recipe = replace(recipe, kernels=place_kernels(recipe, choose_device(asked_device(recipe, device)), threads))

    from ryot.deploy.teacher import open_teacher
    from ryot.optimize.kernels import choose_kernels, format_decision
    from ryot.reinforce.tasks import load_text
    from ryot.reinforce.trainer import build_trainer
    from ryot.run.variant_data import prepare_variant
    from ryot.train.loop import TrainJob, check_resumable, job_identity

    cache = cache_dir()
    if resume is not None:
        check_resumable(resume, **job_identity(recipe, seed))
    teacher = open_teacher(recipe, cache)
    with Progress() as show:
        dataset, _ = prepare_variant(
            recipe, load_text(data, [recipe]), cache, on_progress=show.tell_data, on_report=show.tell_data
        )
    if resume is not None:
        check_resumable(resume, corpus_sha256=dataset.corpus_sha256)
    plan = recipe.kernels
    if not no_tune:
        decision = choose_kernels(recipe, dataset, cache, threads=threads)
        plan = decision.plan
        if decision.candidates:
            click.echo(format_decision(recipe.name, decision), err=True)
    job = TrainJob(variant=recipe, seed=seed, dataset_dir=str(dataset.path))
    trainer = build_trainer(job, plan, teacher, resume)
    if output.exists():
        output.rmdir()
    kept: Path | None = None
    saved_at = time.monotonic()
    with Progress() as show, StopSignals() as signals:
        while not trainer.done and not signals.stop:
            try:
                events = trainer.run_chunk(CHUNK_S)
            except RyotError as error:
                if kept:
                    resume_hint = f"the last good checkpoint is {kept}. To resume: --resume {kept}"
                    error.hint = f"{error.hint}; {resume_hint}" if error.hint else resume_hint
                raise
            for event in events:
                show(event)
            if time.monotonic() - saved_at >= CHECKPOINT_EVERY_S and not trainer.done:
                kept, before = output.with_name(f"{output.name}.step-{trainer.step}"), kept
                trainer.save(kept)
                saved_at = time.monotonic()
                if before:
                    shutil.rmtree(before)
    trainer.save(output)
    trainer.close()
    if kept:
        shutil.rmtree(kept)
    if not trainer.done:
        raise Interrupted(
            f"stopped at step {trainer.step} of {trainer.num_steps}; checkpoint {output} is written",
            hint=f"To resume: --resume {output} and another -o",
        )
    click.echo(output)
