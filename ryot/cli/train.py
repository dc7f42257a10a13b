"""`ryot-deploy train`: one variant in this process, without a cluster."""

from __future__ import annotations

from pathlib import Path

import click

from ryot.cli.options import HELP, cache_dir, check_output_folder, data_option, preset_option, verbose_option


@click.command("train", context_settings=HELP)
@click.option("--variant", metavar="NAME", default="optimized", show_default=True, help="Recipe: a name or a file")
@preset_option
@data_option
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of weights and data order")
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help="Training budget  [default: the recipe's]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of a step")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to train")
@click.option("--no-tune", is_flag=True, help="Keep the recipe's kernels instead of measuring on this machine")
@click.option("--resume", metavar="DIR", type=click.Path(path_type=Path), help="Go on from this checkpoint")
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Checkpoint to write"
)
@verbose_option
def command(
    variant: str,
    preset: str,
    data: tuple[str, ...],
    seed: int,
    tokens: int | None,
    threads: int,
    device: str,
    no_tune: bool,
    resume: Path | None,
    output: Path,
) -> None:
    """Train one variant in this process and write a checkpoint in Hugging Face layout.

    Prints the checkpoint's folder. Ctrl-C stops after the step in flight and writes what there is.

    Example: ryot-deploy train --variant optimized --tokens 40960 -o /tmp/checkpoint
    """
    check_output_folder(output)
    from ryot.cli.progress import Progress
    from ryot.config import replace, resolve_variant

    recipe = resolve_variant(variant, preset, tokens=tokens)
    if device == "cuda":
        import torch

        from ryot.errors import ConfigError

        if not torch.cuda.is_available():
            raise ConfigError("device: got 'cuda', but torch sees no CUDA device here", hint="use --device cpu")
    recipe = replace(recipe, kernels=replace(recipe.kernels, device=device, threads=threads))

    from ryot.optimize.kernels import choose_kernels, format_decision
    from ryot.train.corpus import load_corpus
    from ryot.train.dataset import prepare_dataset
    from ryot.train.loop import Trainer, TrainJob

    dataset, _ = prepare_dataset(load_corpus(data), recipe.model.vocab_size, cache_dir())
    plan = recipe.kernels
    if not no_tune:
        decision = choose_kernels(recipe, dataset, cache_dir(), threads=threads)
        plan = decision.plan
        if decision.candidates:
            click.echo(format_decision(recipe.name, decision), err=True)
    job = TrainJob(variant=recipe, seed=seed, dataset_dir=str(dataset.path))
    trainer = Trainer.resume(job, plan, resume) if resume else Trainer(job, plan)
    if output.exists():
        output.rmdir()
    with Progress() as show:
        try:
            while not trainer.done:
                for event in trainer.run_slice(1.0):
                    show(event)
        except KeyboardInterrupt:
            from ryot.errors import Interrupted

            trainer.save(output)
            raise Interrupted(
                f"stopped at step {trainer.step} of {trainer.num_steps}; checkpoint {output} is written",
                hint=f"go on with --resume {output} and another -o",
            ) from None
    trainer.save(output)
    click.echo(output)
