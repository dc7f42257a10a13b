"""`ryot-deploy batch`: a file of requests, answered as fast as this machine can."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.model_options import address_option, build_model_options, model_options
from ryot.cli.options import HELP, cache_dir, verbose_option
from ryot.errors import EXIT_FAILED, EXIT_OK, Interrupted

if TYPE_CHECKING:
    from ryot.serve.batch import Progress
    from ryot.serve.model import ModelOptions

#: Bad lines that are shown one by one.
SHOWN = 5


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
@model_options(threads=None, rows=None)
@address_option
@verbose_option
def command(
    bundle: Path,
    requests: Path,
    output: Path,
    threads: int | None,
    rows: int | None,
    context: int | None,
    kv_memory: int | None,
    prefix_cache: int,
    address: str | None,
) -> int:
    """Answer a file of requests in OpenAI's batch format; run it again to go on where it was stopped.

    Ends with 1 where lines could not be read or requests were refused; all others are answered then too.

    Example: ryot-deploy batch runs/first/bundle requests.jsonl -o answers.jsonl
    """

    def build_options(threads: int, rows: int) -> ModelOptions:
        return build_model_options(threads, rows, context, kv_memory, prefix_cache, max_waiting=sys.maxsize)

    from ryot.serve.sizing import DEFAULT_ROWS, choose_size

    try:
        if address is not None:
            from ryot.cluster.batches import run_cluster_batch
            from ryot.cluster.options import ClusterOptions

            # What this machine is like says nothing of the cluster's.
            options = build_options(threads or 1, rows or DEFAULT_ROWS)
            click.echo(f"{options.threads} threads and {options.rows} rows on each actor", err=True)
            progress, bad = run_cluster_batch(
                bundle, options, requests, output, _show, ClusterOptions(address=address, malloc_tunables="")
            )
        else:
            from ryot.edge.bundle import load_bundle
            from ryot.edge.widths import WIDTHS
            from ryot.serve.batch import count_lines, run_batch
            from ryot.serve.model import ServedModel, choose_kv_bytes

            widest = build_options(1, WIDTHS[-1])
            loaded = load_bundle(bundle)
            size = choose_size(
                loaded,
                cache_dir(),
                threads=threads,
                rows=rows,
                num_requests=count_lines(requests),
                kv_bytes=widest.kv_bytes or choose_kv_bytes(loaded, widest),
            )
            click.echo(size.why, err=True)
            progress, bad = run_batch(
                ServedModel(bundle, build_options(size.threads, size.rows)), requests, output, _show
            )
    except KeyboardInterrupt as error:
        raise Interrupted("the batch was interrupted", hint="To resume: the same command") from error
    for line in bad[:SHOWN]:
        click.echo(f"{requests}: line {line.number} is passed over: {line.reason}", err=True)
    if len(bad) > SHOWN:
        click.echo(f"{requests}: {len(bad) - SHOWN} more lines are passed over", err=True)
    if progress.lost:
        click.echo(f"{progress.lost} requests met an error of this machine. To resume: the same command", err=True)
    click.echo(
        f"{output}: {progress.before + progress.done} of {progress.total} answers, {progress.done} of them new "
        f"({progress.failed} refused), {progress.completion_tokens} tokens in {progress.seconds:.1f} s, "
        f"{progress.tokens_per_s:.1f} tok/s",
        err=True,
    )
    return EXIT_FAILED if bad or progress.failed or progress.lost else EXIT_OK


def _show(progress: Progress) -> None:
    left = "" if progress.left_s is None else f", {_duration(progress.left_s)} left"
    click.echo(
        f"{progress.before + progress.done} of {progress.total}, {progress.tokens_per_s:.1f} tok/s{left}", err=True
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
