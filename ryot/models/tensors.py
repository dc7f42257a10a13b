"""How a family's tensors, under Hugging Face's names, become the arrays of a decoder, and back.

    # D model dim, N heads, H head dim

Each array comes from one tensor or from several stacked by rows, after a change of layout that can be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ryot.errors import CheckpointError
from ryot.models.spec import DecoderSpec, parameter_shapes

FloatArray = NDArray[np.float32]

#: `rows` as they are; `transposed` [in, out]; `heads` query, key and value of each head below each other, [N, 3, H, …];
#: `plus_one` a norm's weight of which the family stores the difference from 1.
Layout = Literal["rows", "transposed", "heads", "plus_one"]


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One array of ours and the tensors that it comes from."""

    name: str
    """Its name in the torch decoder's `state_dict()`."""
    tensors: tuple[str, ...]
    """Hugging Face's names."""
    rows: tuple[int, ...] = ()
    """Rows of each tensor, where there are several."""
    layout: Layout = "rows"
    copy: str = ""
    """A tensor that may be stored again under this name, such as a tied head, and must then be equal."""


def stacked(name: str, parts: Iterable[tuple[str, int]]) -> TensorMap:
    """An array made of several tensors, given as (name, rows)."""
    names, rows = zip(*parts)
    return TensorMap(name, names, rows)


def load_arrays(
    spec: DecoderSpec, maps: Iterable[TensorMap], load: Callable[[str], FloatArray], where: str
) -> Iterator[tuple[str, FloatArray]]:
    """Each array of the decoder with its name, one at a time, in the order of `maps`.

    `load` gives a float32 tensor by Hugging Face's name. Raises `CheckpointError` for a shape that contradicts the
    config (both sides are said) and for values that are not finite.
    """
    shapes = parameter_shapes(spec)
    for entry in maps:
        shape = shapes[entry.name][::-1] if entry.layout == "transposed" else shapes[entry.name]
        parts = []
        for name, rows in zip(entry.tensors, entry.rows or shape[:1]):
            part = load(name)
            _check_shape(name, part.shape, (rows, *shape[1:]), where)
            _check_finite(name, part, where)
            parts.append(part)
        yield entry.name, read_layout(spec, entry.layout, parts[0] if len(parts) == 1 else np.concatenate(parts))


def check_copies(
    maps: Iterable[TensorMap], found: Iterable[str], load: Callable[[str], FloatArray], where: str
) -> None:
    """Raise `CheckpointError` for a stored copy that differs from what it should be a copy of."""
    names = set(found)
    for entry in maps:
        if entry.copy in names and not np.array_equal(load(entry.tensors[0]), load(entry.copy)):
            raise CheckpointError(
                f"{where}: {entry.copy} differs from {entry.tensors[0]}, expected to be equal by tie_word_embeddings",
                hint="set tie_word_embeddings to false in config.json",
            )


def hf_shapes(spec: DecoderSpec, maps: Iterable[TensorMap]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `hf_tensors` gives, in its order."""
    shapes = parameter_shapes(spec)
    found: dict[str, tuple[int, ...]] = {}
    for entry in maps:
        shape = shapes[entry.name][::-1] if entry.layout == "transposed" else shapes[entry.name]
        found |= {name: (rows, *shape[1:]) for name, rows in zip(entry.tensors, entry.rows or shape[:1])}
    return found


def hf_tensors(
    spec: DecoderSpec, maps: Iterable[TensorMap], load: Callable[[str], FloatArray]
) -> Iterator[tuple[str, FloatArray]]:
    """The tensors under Hugging Face's names, one by one, packed matrices taken apart; a tied head is left out.

    `load` gives an array by our name.
    """
    for entry in maps:
        array = write_layout(spec, entry.layout, load(entry.name))
        starts = np.cumsum(entry.rows)[:-1].tolist() if entry.rows else []
        for name, part in zip(entry.tensors, np.split(array, starts) if entry.rows else [array]):
            yield name, np.ascontiguousarray(part)


def check_names(
    spec: DecoderSpec, maps: Iterable[TensorMap], found: Iterable[str], optional: Iterable[str], where: str
) -> None:
    """Raise `CheckpointError` for a tensor that is missing or not known; `optional` ones may be there unread."""
    known = {name for entry in maps for name in entry.tensors}
    names = set(found)
    if extra := sorted(names - known - set(optional)):
        raise CheckpointError(f"{where}: tensor {extra[0]} is not part of a {spec.family} model of this config.json")
    if missing := sorted(known - names):
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing")


def read_layout(spec: DecoderSpec, layout: Layout, array: FloatArray) -> FloatArray:
    """Our array from a tensor as it is stored."""
    match layout:
        case "rows":
            return array
        case "transposed":
            return np.ascontiguousarray(array.T)
        case "plus_one":
            return array + np.float32(1)
        case "heads":
            by_head = array.reshape(spec.num_heads, 3, spec.head_dim, *array.shape[1:])
            return np.ascontiguousarray(by_head.swapaxes(0, 1)).reshape(array.shape)


def write_layout(spec: DecoderSpec, layout: Layout, array: FloatArray) -> FloatArray:
    """A tensor as it is stored from our array."""
    match layout:
        case "rows":
            return array
        case "transposed":
            return array.T
        case "plus_one":
            return array - np.float32(1)
        case "heads":
            by_kind = array.reshape(3, spec.num_heads, spec.head_dim, *array.shape[1:])
            return by_kind.swapaxes(0, 1).reshape(array.shape)


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
    if found != expected:
        raise CheckpointError(f"{where}: {name} is {list(found)}, expected {list(expected)} by config.json")


def _check_finite(name: str, array: FloatArray, where: str) -> None:
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise CheckpointError(
            f"{where}: {name} has {bad} values that are not finite (NaN or infinity) of {array.size}",
            hint="go back to an earlier checkpoint",
        )
