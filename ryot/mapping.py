"""The one way between dataclasses and plain values (TOML tables, JSON objects), on the device and off it.

`build_from_mapping` is for what people write: it refuses unknown keys and wrong types. `read_mapping` is for what ryot
wrote, perhaps an older or a newer one: it passes over keys that no field has. Both take a field's former name.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

from ryot.errors import ConfigError, require

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

#: Parsed TOML or JSON, or a manifest: values of which nobody has checked the types yet. What reads one does.
Unchecked: TypeAlias = Mapping[str, Any]

_FORMERLY, _FORMER_VALUES = "formerly", "former_values"
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def formerly(name: str | None = None, *, values: Mapping[object, object] | None = None) -> dict[str, object]:
    """Metadata of a field that files of older versions call `name`, or whose `values` they write in another way."""
    return {_FORMERLY: name, _FORMER_VALUES: values or {}}


def also_called(name: str) -> dict[str, object]:
    """Metadata of a field that people write as `name`, a word that Python keeps for itself."""
    return formerly(name)


def to_mapping(config: DataclassInstance, *, keep_none: bool = False) -> dict[str, Any]:
    """The dataclass as nested plain values; fields that are None are left out unless kept (TOML has no null)."""

    def plain(items: list[tuple[str, object]]) -> dict[str, object]:
        return {k: [*v] if isinstance(v, tuple) else v for k, v in items if keep_none or v is not None}

    return dataclasses.asdict(config, dict_factory=plain)


def build_from_mapping(cls: type[T], values: Mapping[str, object], where: str) -> T:
    """An instance of the dataclass `cls`; nested dataclasses are built from nested tables.

    Raises `ConfigError` for an unknown key (with the nearest known one), a missing key or a value of another type.
    """
    _check_keys(cls, values, where)
    hints, built = _hints(typing.cast(type, cls)), dict[str, object]()
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = next((name for name in _names(field) if name in values), None)
        if key is not None:
            built[field.name] = _checked(values[key], hints[field.name], f"{where}.{key}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: {field.name} is missing")
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}", hint=error.hint) from None


def read_mapping(cls: type[T], values: Mapping[str, object]) -> T:
    """The instance that `to_mapping` made `values` from. Raises `TypeError` or `ValueError` when it did not."""
    built = {}
    for name, names, former, read in _readers(typing.cast(type, cls)):
        for key in names:
            if key in values:
                value = values[key]
                if former and value in former:
                    value = former[value]
                built[name] = value if read is None or value is None else read(value)
                break
    return cls(**built)


def unknown(what: str, got: object, known: Iterable[object]) -> str:
    """The one-line message for a name that does not exist, with the nearest one that does."""
    import difflib  # not on the device's way to its first token

    names = [str(k) for k in known]
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"{what}: {got!r} is not known{guess} (known: {', '.join(names)})"


def check_known(values: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for the first key of `values` that is not in `known`."""
    names = list(known)
    for key in values:
        if key not in names:
            raise ConfigError(unknown(f"{where}: key", key, names))


def _names(field: dataclasses.Field[object]) -> tuple[str, ...]:
    """The keys under which a field may stand."""
    former = field.metadata.get(_FORMERLY)
    return (field.name, former) if former else (field.name,)


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    """The type of each field."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check_keys(cls: type, values: Mapping[str, object], where: str) -> None:
    """Refuse an unknown key at any depth, before anything else is said about the values."""
    hints = {name: _hints(cls)[field.name] for field in dataclasses.fields(cls) for name in _names(field)}
    former = [field.metadata.get(_FORMERLY) for field in dataclasses.fields(cls)]
    check_known([key for key in values if key not in former], _hints(cls), where)
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            _check_keys(typing.cast(type, hints[name]), value, f"{where}.{name}")


def _checked(value: Any, hint: object, where: str) -> object:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, Mapping), where, value, "a table")
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
        require(isinstance(value, (list, tuple)), where, value, "a list")
        return tuple(_checked(v, args[0], where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in _EXPECTED:
        require(
            isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), where, value, _EXPECTED[hint]
        )
    return value


_Reader = Callable[[Any], object]
#: A field's name, the keys it may stand under, former values, and how a value is read if not as it is.
_FieldReader = tuple[str, tuple[str, ...], Mapping[object, object], _Reader | None]


@functools.cache
def _readers(cls: type) -> list[_FieldReader]:
    found: list[_FieldReader] = []
    for field in dataclasses.fields(cls):
        found.append(
            (field.name, _names(field), field.metadata.get(_FORMER_VALUES, {}), _reader(_hints(cls)[field.name]))
        )
    return found


def _reader(hint: object) -> _Reader | None:
    """What gives a value the classes that its type asks for; None for a type whose values are plain."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return functools.partial(read_mapping, typing.cast(type, hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return lambda value: hint(*value)
    if origin in (typing.Union, types.UnionType):
        return _reader(next(a for a in args if a is not type(None)))
    if origin is tuple and args[-1] is not Ellipsis:
        return tuple
    if origin in (tuple, list):
        item = _reader(args[0])
        return origin if item is None else lambda value: origin(map(item, value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        entry = _reader(args[1])
        return None if entry is None else lambda value: {k: v if v is None else entry(v) for k, v in value.items()}
    return None
