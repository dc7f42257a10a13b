"""Reading a Hugging Face `config.json`.

A key that is missing, or null where transformers has a default for null, takes transformers' default, which the family
states where it reads the key. A key that changes what transformers computes and that we do not compute is refused by
name; a key that transformers' own class does not know changes nothing there and is ignored here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ryot.errors import CheckpointError

if TYPE_CHECKING:
    from ryot.models.spec import Activation

T = TypeVar("T")
D = TypeVar("D")
V = TypeVar("V")


class HFConfig:
    """The values of one `config.json`, read with their types checked."""

    def __init__(self, values: Mapping[str, object], where: str):
        self.values, self.where = values, where

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int) -> int:
        """A whole number; the default where the key is missing or null."""
        value = self._get(key, default, (int,), "a whole number")
        return int(value)

    def count(self, key: str, default: int) -> int:
        """A whole number above 0; the default where the key is missing or null."""
        value = self.integer(key, default)
        if value < 1:
            raise CheckpointError(f"{self.where}: {key} is {value!r}, expected a whole number above 0")
        return value

    def number(self, key: str, default: float) -> float:
        """A number; the default where the key is missing. Null is refused: transformers fails at it too."""
        if key in self.values and self.values[key] is None:
            raise CheckpointError(f"{self.where}: {key} is null, expected a number")
        return float(self._get(key, default, (int, float), "a number"))

    def positive(self, key: str, default: float) -> float:
        """A number above 0; the default where the key is missing."""
        value = self.number(key, default)
        if value <= 0:
            raise CheckpointError(f"{self.where}: {key} is {value!r}, expected a number above 0")
        return value

    def optional_count(self, key: str, default: int | None) -> int | None:
        """A whole number above 0, or None where the key is null; the default where it is missing."""
        return self.count(key, 1) if self.has(key) else None if key in self.values else default

    def flag(self, key: str, default: bool) -> bool:
        """True or false; the default where the key is missing or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, expected true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string; the default where the key is missing or null."""
        return str(self._get(key, default, (str,), "a string"))

    def table(self, key: str) -> dict[str, Any] | None:
        """A nested object; None where the key is missing or null."""
        value = self._get(key, None, (dict,), "an object")
        return None if value is None else dict(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers. Raises `CheckpointError` where the key is missing."""
        values = self.items(key)
        numbers = [v for v in values or () if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if values is None or len(numbers) < len(values):
            raise CheckpointError(f"{self.where}: {key} is {values!r}, expected a list of numbers")
        return tuple(map(float, numbers))

    def items(self, key: str) -> list[object] | None:
        """A list; None where the key is missing or null."""
        value = self._get(key, None, (list,), "a list")
        return None if value is None else list(value)

    def choice(self, key: str, default: str, known: Mapping[str, V]) -> V:
        """What `known` has for the string at `key`. Raises `CheckpointError` naming those that are known."""
        value = self.text(key, default)
        if value not in known:
            raise CheckpointError(f"{self.where}: {key} is {value!r}, expected one of {', '.join(known)}")
        return known[value]

    def require(self, **allowed: object) -> None:
        """Refuse a key that has another value than the one that is computed here; missing and null are that value."""
        for key, expected in allowed.items():
            value = self.values.get(key)
            if value is not None and value != expected:
                raise CheckpointError(f"{self.where}: {key} is {value!r}, expected {expected!r}")

    def refuse_others(self, known: Iterable[str], *, allow_if_default: Iterable[str] = ()) -> None:
        """Refuse the first key that is not known and not null."""
        for key, value in self.values.items():
            if value is not None and key not in known and key not in allow_if_default:
                raise CheckpointError(f"{self.where}: {key} is {value!r}, which is not understood")

    def _get(self, key: str, default: D, types: tuple[type[T], ...], expected: str) -> T | D:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, types) or isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, expected {expected}")
        return value


#: Activation names of transformers (`ACT2FN`) that are computed here.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}

#: transformers' name of each activation.
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu", "relu": "relu"}
