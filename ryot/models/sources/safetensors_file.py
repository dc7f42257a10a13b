"""One safetensors file, tensor by tensor, as numpy float32.

The format (github.com/huggingface/safetensors, read 2026-11-26): 8 bytes that hold the header's length, little-endian;
the header, a JSON object name -> {dtype, shape, data_offsets}; the data. The package's own numpy reader cannot give
bfloat16 without a further package, and maps the whole file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ryot.errors import CheckpointError
from ryot.models.sources.checkpoint import FloatArray

#: Bytes of one value, for the kinds that weights come in.
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
#: Kinds that old checkpoints keep buffers in (GPT-2's causal mask); they are listed and never loaded.
_BUFFERS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
_NUMPY = {"F64": "<f8", "F16": "<f2"}
#: Values that are converted in one go.
_CHUNK_VALUES = 1 << 20
#: The format's own limit on its header, in bytes.
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `offset` and `num_bytes` count from the file's start."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def read(self, dtype: str) -> NDArray[np.generic]:
        """Its values as numpy's `dtype`. Raises `CheckpointError` when the file has become shorter."""
        return self.read_part(dtype, 0, math.prod(self.shape)).reshape(self.shape)

    def read_part(self, dtype: str, start: int, count: int) -> NDArray[np.generic]:
        """`count` values from the one at `start` on, flat."""
        offset = self.offset + start * np.dtype(dtype).itemsize
        try:
            values = np.fromfile(self.path, dtype, count, offset=offset)
        except OSError as error:
            raise CheckpointError(f"checkpoint {self.path}: cannot be read ({error.strerror})") from error
        if len(values) != count:
            raise CheckpointError(f"checkpoint {self.path}: got shorter while it was read")
        return values


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises `CheckpointError` when it is cut short or no safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _HEADER_LIMIT:
                raise CheckpointError(
                    f"checkpoint {path}: is no safetensors file ({size} bytes, its header would have {length})"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror})") from error
    if len(header) < length:
        raise CheckpointError(
            f"checkpoint {path}: cut short, {size} bytes, its header alone needs {8 + length}", hint="download it again"
        )
    try:
        entries = json.loads(header, object_pairs_hook=_refuse_twice)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(path, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: its safetensors header is malformed ({error})") from error
    end = max((t.offset + t.num_bytes for t in tensors.values()), default=0)
    if end > size:
        raise CheckpointError(
            f"checkpoint {path}: cut short, {size} bytes, its header says {end}", hint="download it again"
        )
    return tensors


def load_float32(tensor: StoredTensor, name: str) -> FloatArray:
    """A stored tensor as float32. Raises `CheckpointError` for a kind that holds no floating-point weights."""
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(
            f"checkpoint {tensor.path}: tensor {name} is {tensor.dtype}, expected one of {', '.join(_FLOATS)}"
        )
    if tensor.dtype == "F32":
        return tensor.read("<f4").astype(np.float32, copy=False)
    # In pieces: what is read and what it becomes are not both in memory whole.
    values = np.empty(math.prod(tensor.shape), np.float32)
    for start in range(0, len(values), _CHUNK_VALUES):
        piece = values[start : start + _CHUNK_VALUES]
        if tensor.dtype == "BF16":
            # The upper half of a float32.
            np.left_shift(tensor.read_part("<u2", start, len(piece)), 16, out=piece.view(np.uint32), dtype=np.uint32)
        else:
            piece[:] = tensor.read_part(_NUMPY[tensor.dtype], start, len(piece))
    return values.reshape(tensor.shape)


def write_float32(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, FloatArray]]) -> None:
    """Write a file of float32 tensors, which come one at a time in the order of `shapes`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, values), (expected, shape) in zip(tensors, shapes.items(), strict=True):
            assert name == expected and values.shape == shape
            file.write(np.ascontiguousarray(values, "<f4").data)


def _stored(path: Path, entry: dict[str, object], start: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise ValueError(f"an entry is {entry}")
    begin, end = (int(x) for x in offsets)
    width = _FLOATS.get(dtype) or _BUFFERS.get(dtype)
    if begin < 0 or end < begin or (width and end - begin != width * math.prod(shape)):
        raise ValueError(f"{end - begin} bytes cannot hold {dtype} of shape {shape}")
    return StoredTensor(path=path, dtype=dtype, shape=tuple(shape), offset=start + begin, num_bytes=end - begin)


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice")
    return values
