"""Options of the commands that run a bundle for many requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ryot.serve.model import ModelOptions

MEGABYTE = 1_000_000
Command = TypeVar("Command", bound=Callable[..., object])


def model_options(*, threads: int | None, rows: int | None) -> Callable[[Command], Command]:
    """`--threads`, `--rows`, `--context`, `--kv-memory` and `--prefix-cache`, for `build_model_options`.

    None leaves it to the command what the machine can do.
    """
    options = (
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            default=threads,
            show_default="the cores it may use" if threads is None else True,
            help="Threads of onnxruntime a bundle",
        ),
        click.option(
            "--rows",
            type=click.IntRange(1, 256),
            default=rows,
            show_default="what is measured to pay" if rows is None else True,
            help="Requests computed together",
        ),
        click.option(
            "--context", type=click.IntRange(min=2), help="Tokens of a prompt and its answer  [default: the bundle's]"
        ),
        click.option(
            "--kv-memory",
            type=click.IntRange(min=1),
            metavar="MB",
            help="Memory for keys and values  [default: by what is free]",
        ),
        click.option(
            "--prefix-cache",
            type=click.IntRange(min=0),
            metavar="MB",
            default=256,
            show_default=True,
            help="Memory for beginnings that prompts share; 0 keeps none",
        ),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def address_option(command: Command) -> Command:
    """`--address` of a Ray cluster."""
    help_text = "Use the machines of this Ray cluster: HOST:PORT or auto"
    return click.option("--address", metavar="HOST:PORT", help=help_text)(command)


def build_model_options(
    threads: int, rows: int, context: int | None, kv_memory: int | None, prefix_cache: int, **more: Any
) -> ModelOptions:
    """The options as `ModelOptions`, with `more` of its fields."""
    from ryot.serve.model import ModelOptions

    return ModelOptions(
        threads=threads,
        rows=rows,
        context=context,
        kv_bytes=None if kv_memory is None else kv_memory * MEGABYTE,
        prefix_cache_bytes=prefix_cache * MEGABYTE,
        **more,
    )
