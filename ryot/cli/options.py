"""Options that several commands share, and values made from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ryot.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class CommaList(click.ParamType):
    """`a,b,c` as a tuple; each part is converted by `item`, and messages call the parts `what`."""

    name = "LIST"

    def __init__(self, item: Callable[[str], Any] = str, what: str = "names"):
        self.item, self.what = item, what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.item(part.strip()) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.what} separated by commas", param, ctx)


def verbose_option(function: F) -> F:
    """`-v` after the command's name means what it means before it."""

    def set_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            import logging

            logging.getLogger().setLevel(logging.INFO)
            ctx.obj = True

    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=set_verbose,
        help="Show logs, decisions with their evidence, and tracebacks",
    )(function)


def format_option(*formats: str) -> Callable[[F], F]:
    """`--format`, one of `formats`; the first is the default."""
    return click.option(
        "--format", "fmt", type=click.Choice(formats), default=formats[0], show_default=True, help="Output"
    )


def preset_option(function: F) -> F:
    """`--preset NAME|FILE`."""
    return click.option(
        "--preset",
        metavar="NAME",
        default="reference",
        show_default=True,
        help="Size: reference, small, medium or a file",
    )(function)


def data_option(function: F) -> F:
    """`--data PATH`, several times."""
    return click.option(
        "--data",
        metavar="PATH",
        multiple=True,
        help="UTF-8 text: a file, folder or glob; may be repeated  [default: the standard library's source]",
    )(function)


def cache_dir() -> Path:
    """Folder for what runs share: RYOT_CACHE_DIR, by default ~/.cache/ryot."""
    return Path(os.environ.get("RYOT_CACHE_DIR") or Path("~/.cache/ryot").expanduser())


def check_output_folder(path: Path) -> None:
    """Raise `ConfigError` unless `path` is an empty folder that can be written to, or can be made one."""
    if path.exists():
        if not path.is_dir():
            raise ConfigError(f"output {path}: is a file, expected a folder")
        if any(path.iterdir()):
            raise ConfigError(
                f"output {path}: is not empty",
                hint=f"choose another folder, or resume with --resume {path}",
            )
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"output {path}: {parent} is not writable")
