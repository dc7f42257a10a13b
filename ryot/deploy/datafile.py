"""The one external data file that all graphs of a bundle share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx
from numpy.typing import NDArray

#: Arrays smaller than this stand inside the graph.
INLINE_BELOW_BYTES = 256
#: Large arrays begin on a page, so that the runtime maps them without dragging in their neighbours.
PAGE_BYTES = 4096
LARGE_BYTES = 16 * PAGE_BYTES
#: Small ones on a cache line.
LINE_BYTES = 64


class DataFile:
    """Appends arrays to a file, each distinct content once, and makes the tensors that point at them.

    Two graphs, or two operators that read the same bytes under different shapes, share one copy because equal bytes
    are written once.
    """

    def __init__(self, path: Path):
        self.location = path.name
        self._file = path.open("wb")
        self._end = 0
        self._placed: dict[bytes, int] = {}

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def flush(self) -> None:
        """Have the file hold all that was placed."""
        self._file.flush()

    def place(self, content: bytes | memoryview) -> int:
        """Offset of `content` in the file; written if it is not there yet."""
        key = hashlib.sha256(content).digest()
        if key not in self._placed:
            alignment = PAGE_BYTES if len(content) >= LARGE_BYTES else LINE_BYTES
            offset = -(-self._end // alignment) * alignment
            self._file.write(bytes(offset - self._end))
            self._file.write(content)
            self._placed[key], self._end = offset, offset + len(content)
        return self._placed[key]

    def tensor(self, name: str, array: NDArray[np.generic]) -> onnx.TensorProto:
        """A tensor named `name` with the values of `array`, inside the proto if tiny and in the file otherwise."""
        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_BELOW_BYTES:
            return onnx.numpy_helper.from_array(array, name)
        content = array.data.cast("B")  # no copy of a large one
        tensor = onnx.TensorProto(
            name=name,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        entries = {"location": self.location, "offset": self.place(content), "length": len(content)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor
