"""`ryot-deploy bench`: bundles measured over a grid of prompt and answer lengths."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import click

from ryot.cli.options import HELP, CommaList, format_option, verbose_option
from ryot.config import DEFAULT_ROUNDS
from ryot.mapping import to_mapping

_SCHEMA = 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_INTS = CommaList(_positive, "whole numbers above 0")


@click.command("bench", context_settings=HELP)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-p", "--n-prompt", metavar="LIST", type=_INTS, help="Prompt lengths  [default: the context]")
@click.option("-n", "--n-gen", metavar="LIST", type=_INTS, help="Tokens to decode  [default: 3/4 of the context]")
@click.option("-d", "--n-depth", metavar="LIST", type=_INTS, help="Depth decoding begins at  [default: 1/4 of it]")
@click.option("-b", "--batch", metavar="LIST", type=_INTS, default="1", show_default=True, help="Sequences at once")
@click.option("-t", "--threads", metavar="LIST", type=_INTS, default="1", show_default=True, help="Threads")
@click.option(
    "-r",
    "--repetitions",
    metavar="N",
    type=click.IntRange(min=1),
    default=DEFAULT_ROUNDS,
    show_default=True,
    help="Fresh processes",
)
@format_option("table", "md", "csv", "json")
@verbose_option
def command(
    bundles: tuple[Path, ...],
    n_prompt: tuple[int, ...] | None,
    n_gen: tuple[int, ...] | None,
    n_depth: tuple[int, ...] | None,
    batch: tuple[int, ...],
    threads: tuple[int, ...],
    repetitions: int,
    fmt: str,
) -> int:
    """Measure bundles in fresh processes of the edge runtime, interleaved. Lists separated by commas make a grid.

    Example: ryot-deploy bench runs/first/bundle -p 32,128 -n 96 -d 32 -r 3
    """
    from ryot.deploy.bench import Grid, row_cells, run_grid
    from ryot.edge.bundle import load_bundle
    from ryot.edge.measure import record_environment

    context = min(load_bundle(path, verify=False).model.context_length for path in bundles)
    grid = Grid(
        n_prompt=n_prompt or (context,),
        n_gen=n_gen or (context - context // 4,),
        n_depth=n_depth or (context // 4,),
        batch=batch,
        threads=threads,
    )
    rows = run_grid(
        bundles,
        grid,
        rounds=repetitions,
        on_result=lambda path, r: click.echo(
            f"round {r.round + 1} {path}{': ' + r.reason if not r.ok else ''}", err=True
        ),
    )
    if fmt == "json":
        values = {
            "schema": _SCHEMA,
            "environment": record_environment(),
            "rows": [to_mapping(row, keep_none=True) for row in rows],
        }
        click.echo(json.dumps(values, indent=1))
    elif fmt == "csv":
        text = io.StringIO()
        names = [f.name for f in dataclasses.fields(rows[0]) if f.name != "samples_ms"]
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(to_mapping(row, keep_none=True) for row in rows)
        click.echo(text.getvalue(), nl=False)
    else:
        from tabulate import tabulate

        cells = [row_cells(row) for row in rows]
        right = {"size MB", "params M", "threads", "batch", "t/s", "ms", "peak MB"}
        align = ["right" if header in right else "left" for header in cells[0]]
        style = "github" if fmt == "md" else "simple"
        click.echo(tabulate(cells, "keys", style, disable_numparse=True, colalign=align))
    return 0 if all(not row.reason for row in rows) else 1
