"""Options that several commands share, and values made from them."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, get_args

import click

from ryot.config import DEFAULT_DEVICE, DEFAULT_PRESET, DeviceChoice
from ryot.errors import ConfigError

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., object])

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class CommaList(click.ParamType[tuple[object, ...]]):
    """`a,b,c` as a tuple; each part is converted by `item`, and messages call the parts `what`."""

    name = "LIST"

    def __init__(self, item: Callable[[str], object] = str, what: str = "names"):
        self.item, self.what = item, what

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[object, ...]:
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
        default=DEFAULT_PRESET,
        show_default=True,
        help="Size: reference, small, 30m, medium, 124m, 350m or a file",
    )(function)


def device_option(function: F) -> F:
    """`--device auto|cpu|cuda`."""
    return click.option(
        "--device",
        type=click.Choice(get_args(DeviceChoice)),
        default=DEFAULT_DEVICE,
        show_default=True,
        help="Where to train: auto is a GPU where there is one",
    )(function)


def data_option(function: F) -> F:
    """`--data PATH`, several times."""
    return click.option(
        "--data",
        metavar="PATH",
        multiple=True,
        help="UTF-8 text, also .jsonl, .gz, .zst: a file, folder or glob; may be repeated  "
        "[default: the standard library's source]",
    )(function)


def host_options(function: F) -> F:
    """HOST..., `--fleet`, `--ssh-config`, `--root` and `--jobs`: which devices, and how they are reached."""
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    for decorate in (
        click.argument("hosts", nargs=-1, metavar="[HOST...]"),
        click.option("--fleet", metavar="FILE", type=file, help="Devices, in TOML; all of them when no host is named"),
        click.option("--ssh-config", metavar="FILE", type=file, help="ssh's configuration  [default: ssh's own]"),
        click.option("--root", metavar="DIR", help="Folder there  [default: ~/.local/share/ryot]"),
        click.option(
            "--jobs", metavar="N", type=click.IntRange(min=1), default=16, show_default=True, help="Hosts at once"
        ),
    )[::-1]:
        function = decorate(function)
    return function


def cache_dir() -> Path:
    """Folder for what runs share: RYOT_CACHE_DIR, by default ~/.cache/ryot; it is there and can be written to.

    Where the default cannot be, a temporary folder of this user's is taken, and that is said. Raises `ConfigError` when
    RYOT_CACHE_DIR is no such folder.
    """
    if given := os.environ.get("RYOT_CACHE_DIR"):
        check_utf8("RYOT_CACHE_DIR", given)
        if reason := _why_not_writable(Path(given)):
            raise ConfigError(
                f"cache {given}: {reason}", hint="set RYOT_CACHE_DIR to a folder that can be written to, or unset it"
            )
        return Path(given)
    try:
        folder = Path("~/.cache/ryot").expanduser()
        check_utf8("home", str(folder))
        reason = _why_not_writable(folder)
    except (RuntimeError, ConfigError) as error:
        folder, reason = Path("~/.cache/ryot"), str(error)
    if not reason:
        return folder
    instead = _temporary_cache()
    log.warning("cache %s: %s; %s is used instead (RYOT_CACHE_DIR chooses another)", folder, reason, instead)
    return instead


def _why_not_writable(folder: Path) -> str:
    """Why no file can be made in a folder, which is made itself if need be; empty when one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return str(error.strerror or error)


def _temporary_cache() -> Path:
    """The same folder each time, so that it serves the next run too; a new one where that is not ours alone."""
    folder = Path(tempfile.gettempdir()) / f"ryot-cache-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
        # Compiled code lies in it: it must not be someone else's, nor a link to where they like.
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="ryot-cache-"))


def check_utf8(what: str, text: str) -> None:
    """Raise `ConfigError` for text from the system, as Python reads it, whose bytes are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(text).decode("utf-8", errors="backslashreplace")
        encoding = sys.getfilesystemencoding().upper()
        hint = "rename the file, or give the text in UTF-8"
        if encoding != "UTF-8":
            hint = "this locale asks for it: set PYTHONUTF8=1, or LC_ALL to a UTF-8 locale"
        raise ConfigError(f"{what}: {shown} is not {encoding}", hint=hint) from error


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
