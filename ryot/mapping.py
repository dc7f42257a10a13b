"""The one way between dataclasses and plain values (TOML tables, JSON objects), on the device and off it.

`build_from_mapping` is for what people write: it refuses unknown keys and wrong types. `read_mapping` is for what ryot
wrote, perhaps an older or a newer one: it passes over keys that no field has and takes a field's former name.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from ryot.errors import ConfigError

T = TypeVar("T")

_FORMERLY, _FORMER_VALUES = "formerly", "former_values"
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def formerly(name: str | None = None, *, values: Mapping[Any, Any] | None = None) -> dict[str, Any]:
    """Metadata of a field that files of older versions call `name`, or whose `values` they write in another way."""
    return {_FORMERLY: name, _FORMER_VALUES: values or {}}


def to_mapping(config: Any, *, keep_none: bool = False) -> dict[str, Any]:
    """The dataclass as nested plain values; fields that are None are left out unless kept (TOML has no null)."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: [*v] if isinstance(v, tuple) else v for k, v in items if keep_none or v is not None}

    return dataclasses.asdict(config, dict_factory=plain)


def build_from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls`; nested dataclasses are built from nested tables.

    Raises `ConfigError` for an unknown key (with the nearest known one), a missing key or a value of another type.
    """
    _check_keys(cls, values, where)
    hints, built = _hints(typing.cast(type, cls)), dict[str, Any]()
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            built[field.name] = _checked(values[field.name], hints[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: {field.name} is missing")
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}", hint=error.hint) from None


def read_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """The instance that `to_mapping` made `values` from. Raises `TypeError` or `ValueError` when it did not."""
    hints, built = _hints(typing.cast(type, cls)), dict[str, Any]()
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        for name in (field.name, field.metadata.get(_FORMERLY)):
            if name is not None and name in values:
                value, former = values[name], field.metadata.get(_FORMER_VALUES)
                built[field.name] = _trusted(former.get(value, value) if former else value, hints[field.name])
                break
    return cls(**built)


def unknown(what: str, got: object, known: Iterable[object]) -> str:
    """The one-line message for a name that does not exist, with the nearest one that does."""
    import difflib  # not on the device's way to its first token

    names = [str(k) for k in known]
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"{what}: {got!r} is not known{guess} (known: {', '.join(names)})"


def check_known(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for the first key of `values` that is not in `known`."""
    names = list(known)
    for key in values:
        if key not in names:
            raise ConfigError(unknown(f"{where}: key", key, names))


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The type of each field."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Refuse an unknown key at any depth, before anything else is said about the values."""
    hints = _hints(cls)
    check_known(values, hints, where)
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            _check_keys(typing.cast(type, hints[name]), value, f"{where}.{name}")


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        _require(isinstance(value, Mapping), where, value, "a table")
        return build_from_mapping(typing.cast(type, hint), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(unknown(where, value, args))
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _checked(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), where, value, "a list")
        return tuple(_checked(v, args[0], where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in _EXPECTED:
        _require(
            isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), where, value, _EXPECTED[hint]
        )
    return value


def _trusted(value: Any, hint: Any) -> Any:
    """The value with the classes that its type asks for; a scalar is what it was when it was written."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if dataclasses.is_dataclass(hint):
        return read_mapping(typing.cast(type, hint), value)
    if origin in (typing.Union, types.UnionType):
        return _trusted(value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_trusted(v, kind) for v, kind in zip(value, kinds, strict=True))
    if origin is list:
        return [_trusted(v, args[0]) for v in value]
    if isinstance(origin, type) and issubclass(origin, Mapping) and args[1] is not Any:
        return {k: _trusted(v, args[1]) for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    return value


def _require(condition: bool, where: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{where}: got {value!r}, expected {rule}")
