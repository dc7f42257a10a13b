"""What devices answer, as typed data: checked here, once, because a device may run anything and say anything."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, TypeVar

from ryot.edge.protocol import MeasureResult
from ryot.errors import FleetError
from ryot.mapping import read_mapping

A = TypeVar("A")
#: The year 5138: no time that a device tells is later, and every calendar here knows it.
_LAST_TIME_S = 1e11
_EXPECTED = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class ReleaseAnswer(TypedDict):
    """A release, as `ryot.fleet.device.store.Release` has it."""

    id: str
    bundle: str
    name: str
    precision: str
    python: str
    signed_by: str
    installed_at: float
    figures: dict[str, float]


class Nothing(TypedDict):
    """An answer that says that it was done."""


class Opened(TypedDict):
    proved: str | None
    """The release that ran there, proved good, before anything was done."""


class Trusted(TypedDict):
    changed: bool


class FoundPython(TypedDict):
    python: str | None
    """One that has a bundle's packages already."""


class Missing(TypedDict):
    missing: dict[str, int]
    """Hashes, and how many bytes of each came already."""
    disk_free_bytes: int


class Built(TypedDict):
    release: ReleaseAnswer


class Measured(TypedDict):
    environment: dict[str, Any]
    results: list[dict[str, Any]]
    figures: dict[str, float]
    slower: str
    """How it is slower than the version that runs; empty when it is not, or nobody asked."""


class Activated(TypedDict):
    switched: bool


class Status(TypedDict):
    current: ReleaseAnswer | None
    good: list[ReleaseAnswer]
    pending: bool
    disk_free_bytes: int
    golden: NotRequired[str]


class RolledBack(TypedDict):
    current: ReleaseAnswer


def read_answer(shape: type[A], values: Mapping[str, Any]) -> A:
    """`values`, when they are what the `TypedDict` says; more keys may be there. Raises `FleetError`."""
    try:
        _check(values, shape, "")
    except ValueError as error:
        raise FleetError(f"its answer makes no sense: {error}") from error
    return typing.cast(A, values)


def read_results(measured: Measured, rounds: int) -> list[MeasureResult]:
    """What the processes of a measurement gave. Raises `FleetError` when they are others than were asked for."""
    try:
        if len(measured["results"]) != rounds:
            raise ValueError(f"{len(measured['results'])} results, expected {rounds}")
        results = [read_mapping(MeasureResult, values) for values in measured["results"]]
        hints = typing.get_type_hints(MeasureResult)
        for result in results:
            for name, hint in hints.items():
                _check(getattr(result, name), hint, name)
    except (ValueError, TypeError) as error:
        raise FleetError(f"its measurement makes no sense: {error}") from error
    return results


def _check(value: object, hint: Any, where: str) -> None:
    """Raise `ValueError` unless a value, as JSON gave it, is of a type: plain ones, lists, dicts, unions, literals."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return
    if origin is NotRequired:
        _check(value, args[0], where)
    elif origin in (typing.Union, types.UnionType):
        if value is not None or type(None) not in args:
            _check(value, next(a for a in args if a is not type(None)), where)
    elif origin is Literal:
        _demand(value in args, value, where, " or ".join(map(repr, args)))
    elif origin is list:
        _demand(isinstance(value, list), value, where, "a list")
        for item in typing.cast(Sequence[object], value):
            _check(item, args[0], where)
    elif origin is dict:
        _demand(isinstance(value, dict), value, where, "an object")
        for key, item in typing.cast(Mapping[str, object], value).items():
            _check(item, args[1], f"{where}.{key}")
    elif typing.is_typeddict(hint):
        _check_keys(value, hint, where)
    else:
        kinds = (int, float) if hint is float else (hint,)
        _demand(type(value) in kinds, value, where, _EXPECTED[hint])
        if hint is float:
            _demand(math.isfinite(typing.cast(float, value)), value, where, "a finite number")


def _check_keys(value: object, hint: Any, where: str) -> None:
    _demand(isinstance(value, dict), value, where, "an object")
    values = typing.cast(Mapping[str, object], value)
    for name, kind in typing.get_type_hints(hint, include_extras=True).items():
        inside = f"{where}.{name}" if where else name
        if name in values:
            _check(values[name], kind, inside)
        elif typing.get_origin(kind) is not NotRequired:
            raise ValueError(f"{inside} is missing")
    if hint is ReleaseAnswer:
        installed_at = typing.cast(float, values["installed_at"])
        _demand(0 <= installed_at < _LAST_TIME_S, installed_at, f"{where}.installed_at", "seconds since 1970")


def _demand(holds: bool, value: object, where: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{where}: got {str(value)[:60]!r}, expected {expected}")
