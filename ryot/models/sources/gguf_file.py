"""The GGUF container: metadata and tensors of one file, each tensor read from disk when it is asked for.

The format is ggml's (docs/gguf.md of ggml-org/ggml, read 2026-11-26), versions 2 and 3. The kinds of values, block
sizes and dequantizers are the `gguf` package's; its own reader makes a numpy array of every string and takes 5 to 27
seconds for vocabularies of 49 to 262 thousand tokens, this one a tenth of a second to one.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from ryot.errors import CheckpointError
from ryot.models.sources.checkpoint import FloatArray

Value: TypeAlias = "bool | int | float | str | list[str] | list[bool] | list[int] | list[float]"

#: The kinds whose weights are read.
KINDS = frozenset(
    {Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1}
    | {Kind.Q4_K, Kind.Q5_K, Kind.Q6_K}
)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
#: Values that are dequantized in one go: what numpy needs on the way stays small beside the result.
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """Where a tensor lies: shape as numpy has it (the file says it in reverse), `offset` from the file's start."""

    kind: Kind
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufFile:
    """One GGUF file whose header has been read. `metadata` holds plain values, `tensors` where each tensor lies."""

    def __init__(self, path: Path):
        """Raises `CheckpointError` when the file is cut short, split, no GGUF, or of kinds that are not read."""
        self.path = path
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, GgufTensor] = {}
        if _SPLIT.search(path.name):
            raise CheckpointError(
                f"checkpoint {path}: is one part of a split GGUF, expected a whole one",
                hint="join the parts with llama.cpp's llama-gguf-split --merge",
            )
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._read_header(_Cursor(data))
        except (struct.error, IndexError) as error:
            raise self._error("cut short in its header", hint="download it again") from error
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise self._error(f"is malformed ({error})") from error

    def rows(self, name: str) -> NDArray[np.uint8]:
        """The raw bytes of a tensor, one row of them for each row of values."""
        tensor = self.tensors[name]
        try:
            raw = np.fromfile(self.path, np.uint8, tensor.num_bytes, offset=tensor.offset)
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from error
        if len(raw) != tensor.num_bytes:
            raise self._error("got shorter while it was read")
        return raw.reshape(math.prod(tensor.shape[:-1]), -1)

    def dequantize(self, name: str, raw: NDArray[np.uint8]) -> FloatArray:
        """The values of `rows(name)`, in whatever order those rows have come to be."""
        tensor = self.tensors[name]
        cols = math.prod(tensor.shape) // len(raw)
        values = np.empty((len(raw), cols), np.float32)
        step = max(_CHUNK_VALUES // cols, 1)
        for start in range(0, len(raw), step):
            values[start : start + step] = _dequantize(raw[start : start + step], tensor.kind)
        return values.reshape(tensor.shape)

    def _read_header(self, cursor: _Cursor) -> None:
        if len(cursor.data) < 24 or cursor.data[:4] != b"GGUF":
            raise self._error(f"is no GGUF file (it begins with {bytes(cursor.data[:4])!r}, expected b'GGUF')")
        cursor.skip(4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise self._error(f"is GGUF of version {version}, expected 2 or 3 (little-endian)")
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(num_values):
            key = cursor.string()
            if key in self.metadata:
                raise self._error(f"metadata {key} stands twice")
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise self._error(
                "is one part of a split GGUF, expected a whole one",
                hint="join the parts with llama.cpp's llama-gguf-split --merge",
            )
        entries = {}
        for _ in range(num_tensors):
            name = cursor.string()
            shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
            if name in entries:
                raise self._error(f"tensor {name} stands twice")
            entries[name] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._error(f"general.alignment is {alignment}, expected a positive number")
        start = -(-cursor.position // alignment) * alignment
        for name, (shape, number, offset) in entries.items():
            self.tensors[name] = self._placed(name, shape, number, start + offset, len(cursor.data))

    def _placed(self, name: str, shape: tuple[int, ...], number: int, offset: int, size: int) -> GgufTensor:
        try:
            kind = Kind(number)
        except ValueError as error:
            raise self._error(f"tensor {name} is of unknown type {number}", hint="use a newer ryot") from error
        if kind not in KINDS:
            raise self._error(
                f"tensor {name} is {kind.name}, expected one of {', '.join(sorted(k.name for k in KINDS))}",
                hint="use another quantization of this model, Q8_0 or Q4_K_M for example",
            )
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block_size:
            raise self._error(f"tensor {name} has shape {shape}, expected rows of whole blocks of {block_size}")
        num_bytes = math.prod(shape) // block_size * block_bytes
        if offset + num_bytes > size:
            raise self._error(
                f"cut short, {size} bytes, tensor {name} ends at {offset + num_bytes}", hint="download it again"
            )
        return GgufTensor(kind=kind, shape=shape, offset=offset, num_bytes=num_bytes)

    def _error(self, text: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(f"checkpoint {self.path}: {text}", hint=hint)


class _Cursor:
    """Reads a header from start to end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.position = 0

    def skip(self, count: int) -> None:
        self.position += count

    def scalar(self, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value  # type: ignore[no-any-return]

    def string(self) -> str:
        end = self.scalar("Q") + self.position
        if end > len(self.data):
            raise IndexError
        text = self.data[self.position : end].decode("utf-8", errors="replace")
        self.position = end
        return text

    def value(self, kind: int) -> Value:
        if kind in _SCALARS:
            return _shortest(self.scalar(_SCALARS[kind]), kind)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"unknown kind of value {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise ValueError(f"unknown kind of array {item}")
        width = struct.calcsize("<" + _SCALARS[item])
        if self.position + count * width > len(self.data):
            raise IndexError
        values = struct.unpack_from(f"<{count}{_SCALARS[item]}", self.data, self.position)
        self.position += count * width
        return list(values)


def _shortest(value: float, kind: int) -> bool | int | float:
    """A float32 as the decimal number that was meant: 1e-05, where its bits spell 9.999999747378752e-06."""
    return float(str(np.float32(value))) if kind == 6 else value


def _dequantize(raw: NDArray[np.uint8], kind: Kind) -> FloatArray:
    dequantize: Callable[[NDArray[np.uint8], Kind], FloatArray] = gguf.quants.dequantize
    return dequantize(raw, kind)
