"""Command-line options made from the fields of a dataclass: name, type, default and help stand there alone."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ryot.cli.options import CommaList
from ryot.run.options import OptionText, option_fields

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")


def options_from(cls: type) -> Callable[[F], F]:
    """A decorator that adds an option for each field of `cls` that is one, in their order."""

    def decorate(function: F) -> F:
        hints = typing.get_type_hints(cls)
        for name, (field, text) in reversed(option_fields(cls).items()):
            function = _option(name, hints[name], field.default, text)(function)
        return function

    return decorate


def given_values(ctx: click.Context, cls: type) -> dict[str, object]:
    """The fields of `cls` that were given, on the command line or by their environment variable."""
    return {name: ctx.params[name] for name in option_fields(cls) if is_given(ctx, name)}


def build_given(ctx: click.Context, cls: Callable[..., T]) -> T:
    """An instance of the dataclass `cls` from what was given, the rest by default."""
    return cls(**given_values(ctx, typing.cast(type, cls)))


def is_given(ctx: click.Context, name: str) -> bool:
    """Whether an option was given and is not at its default."""
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)


def flag_of(cls: type, name: str) -> str:
    """How the option of a field is written: `--workers-per-variant`."""
    fields = option_fields(cls)
    return f"--{(fields[name][1].flag if name in fields else '') or name.replace('_', '-')}"


def _option(name: str, hint: object, default: Any, text: OptionText) -> Callable[[F], F]:
    flag = f"--{text.flag or name.replace('_', '-')}"
    common: dict[str, Any] = {"help": text.help, "envvar": text.envvar or None}
    if hint is bool:
        if default:
            return click.option(f"{flag}/--no-{flag[2:]}", name, default=True, show_default=True, **common)
        return click.option(flag, name, is_flag=True, **common)
    if dataclasses.is_dataclass(hint):
        raise TypeError(f"{name}: a table cannot be an option")
    if text.choices:
        return click.option(flag, name, type=click.Choice(text.choices), default=default, show_default=True, **common)
    common |= {"metavar": text.metavar}
    if default:
        common |= {"default": default, "show_default": True}
    if typing.get_origin(hint) is tuple:
        if text.repeated:
            return click.option(flag, name, multiple=True, **common)
        if default:
            common["default"] = ",".join(default)
        return click.option(flag, name, type=CommaList(), **common)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    kinds: dict[object, click.ParamType[object]] = {
        int: click.IntRange(min=None if text.at_least is None else int(text.at_least)),
        float: click.FloatRange(min=text.above, min_open=True),
        str: click.STRING,
    }
    return click.option(flag, name, type=kinds[hint], **common)
