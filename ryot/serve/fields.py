"""Reading a request's JSON: each field is there with the right type and range, or the client is told which is not."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

from ryot.serve.errors import ApiError, invalid

#: A larger body is read without garbage collection, for which nothing in it is garbage: of 4 MB of empty lists 0.06 s
#: instead of 0.36, for which every thread waits.
LARGE_BODY_BYTES = 100_000
#: Depth beyond which a request is not looked at: Python's parser recurses.
_TOO_DEEP = "the body: is nested too deep"


def parse_body(data: bytes) -> Fields:
    """The fields of a request's body. Raises `ApiError` for anything but a JSON object in UTF-8."""
    pauses = len(data) > LARGE_BODY_BYTES and gc.isenabled()
    if pauses:
        gc.disable()
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid(None, f"the body: byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise invalid(None, _TOO_DEEP) from error
    except ValueError as error:
        raise invalid(None, f"the body: is not JSON ({error})") from error
    finally:
        if pauses:
            gc.enable()
    if not isinstance(value, dict):
        raise invalid(None, f"the body: got {_kind(value)}, expected an object")
    return Fields(value)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


class Fields:
    """A JSON object whose fields are read one by one; null is as good as absent."""

    def __init__(self, values: Mapping[str, object], path: str = ""):
        self._values = values
        self._path = path

    def where(self, name: str) -> str:
        """The field's name as messages have it."""
        return f"{self._path}{name}"

    def get(self, name: str) -> object:
        """The value as it is; None where absent."""
        return self._values.get(name)

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Raise `ApiError` for a field that is not `known`."""
        for name in self._values:
            if name not in known:
                near = get_close_matches(name[:80], known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise invalid(self.where(name)[:80], f"is not a field of this request{hint}")

    def number(self, name: str, default: float, low: float, high: float = math.inf) -> float:
        """A number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self._wrong(name, f"a number {_range(low, high)}")
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: float = math.inf) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(name, f"a whole number {_range(low, high)}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def table(self, name: str) -> Fields | None:
        """An object, to be read in turn."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Fields(value, f"{self.where(name)}.")

    def items(self, name: str) -> list[object]:
        """A list; empty where absent."""
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def choice(self, name: str, choices: Iterable[str]) -> str | None:
        """One of several strings."""
        value, choices = self.text(name), tuple(choices)
        if value is not None and value not in choices:
            raise self._wrong(name, f"one of {', '.join(choices)}")
        return value

    def _wrong(self, name: str, expected: str) -> ApiError:
        return invalid(self.where(name), f"got {show(self.get(name))}, expected {expected}")


def show(value: object) -> str:
    """A value as a message shows it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: object) -> str:
    names = {str: "a string", int: "a number", float: "a number", list: "a list", bool: "a truth value"}
    return names.get(type(value), "null")


def _range(low: float, high: float) -> str:
    if high == math.inf:
        return f"not below {low:g}"
    return f"from {low:g} to {high:g}"
