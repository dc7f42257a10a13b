"""`ryot-deploy batch`: a file of requests, answered as fast as this machine can."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.options import HELP, verbose_option
from ryot.errors import EXIT_FAILED, EXIT_OK, Interrupted

if TYPE_CHECKING:
    from ryot.serve.batch import Progress

#: Bad lines that are shown one by one.
SHOWN = 5
MEGABYTE = 1_000_000


@click.command("batch", context_settings=HELP)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("requests", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="REQUESTS.jsonl")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="ANSWERS.jsonl",
    help="File of answers; what it holds already is not asked again",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of onnxruntime")
@click.option("--rows", type=click.IntRange(1, 256), default=32, show_default=True, help="Requests computed together")
@click.option(
    "--context", type=click.IntRange(min=2), help="Tokens of a prompt and its answer  [default: the bundle's]"
)
@click.option(
    "--kv-memory",
    type=click.IntRange(min=1),
    metavar="MB",
    help="Memory for keys and values  [default: by what is free]",
)
@click.option(
    "--prefix-cache",
    type=click.IntRange(min=0),
    metavar="MB",
    default=256,
    show_default=True,
    help="Memory for beginnings that prompts share; 0 keeps none",
)
@verbose_option
def command(
    bundle: Path,
    requests: Path,
    output: Path,
    threads: int,
    rows: int,
    context: int | None,
    kv_memory: int | None,
    prefix_cache: int,
) -> int:
    """Answer a file of requests in OpenAI's batch format; run it again to go on where it was stopped.

    Ends with 1 where lines could not be read or requests were refused; all others are answered then too.

    Example: ryot-deploy batch runs/first/bundle requests.jsonl -o answers.jsonl
    """
    from ryot.serve.batch import run_batch
    from ryot.serve.model import ModelOptions, ServedModel

    model = ServedModel(
        bundle,
        ModelOptions(
            threads=threads,
            rows=rows,
            context=context,
            kv_bytes=None if kv_memory is None else kv_memory * MEGABYTE,
            prefix_cache_bytes=prefix_cache * MEGABYTE,
            max_waiting=sys.maxsize,
        ),
    )
    try:
        progress, bad = run_batch(model, requests, output, _show)
    except KeyboardInterrupt as error:
        raise Interrupted("the batch was interrupted", hint="To resume: the same command") from error
    for line in bad[:SHOWN]:
        click.echo(f"{requests}: line {line.number} is passed over: {line.reason}", err=True)
    if len(bad) > SHOWN:
        click.echo(f"{requests}: {len(bad) - SHOWN} more lines are passed over", err=True)
    click.echo(
        f"{output}: {progress.before + progress.done} of {progress.total} answers, {progress.done} of them new "
        f"({progress.failed} refused), {progress.completion_tokens} tokens in {progress.seconds:.1f} s, "
        f"{progress.tokens_per_s:.1f} tok/s",
        err=True,
    )
    return EXIT_FAILED if bad or progress.failed else EXIT_OK


def _show(progress: Progress) -> None:
    left = "" if progress.left_s is None else f", {_duration(progress.left_s)} left"
    click.echo(
        f"{progress.before + progress.done} of {progress.total}, {progress.tokens_per_s:.1f} tok/s{left}", err=True
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
