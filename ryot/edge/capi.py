"""The engine over onnxruntime's C library, called with ctypes: no Python binding, no numpy unless logits are read.

It saves the memory and the import time of both (for a model of two million parameters about 19 MB and 40 % of the time
to the first token) and some 10 % of a step of 0.1 ms, nothing of long ones. The library is the onnxruntime package's.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ryot.edge.bundle import Bundle, check_onnxruntime
from ryot.edge.c_library import FLOAT, INT8, INT32, INT64, Library, Place, load_library, pointer
from ryot.edge.engine import Engine, Role
from ryot.edge.pages import release_code
from ryot.errors import BundleError

if TYPE_CHECKING:
    import numpy as np


class CApiEngine(Engine):
    """An `Engine` through onnxruntime's C library."""

    name = "capi"

    def __init__(self, bundle: Bundle, *, threads: int = 1, batch_size: int = 1, max_len: int | None = None):
        """Load the graphs and make the buffers; raises like `session.OnnxruntimeEngine`, and `EngineUnavailable`."""
        self._library = library = load_library()
        self.onnxruntime_version = library.version
        check_onnxruntime(library.version, bundle.onnxruntime_min)
        super().__init__(bundle, threads=threads, batch_size=batch_size, max_len=max_len)
        self._handles: list[tuple[str, ctypes.c_void_p]] = []
        # At exit the process takes everything with it, faster than by giving it back.
        weakref.finalize(self, _release_all, library, self._handles).atexit = False
        release_code()  # now, so that the peak while loading is lower, and once more when all is loaded
        self._decode = decode = self._load("decode")
        prefill = decode if bundle.one_session else self._load("prefill")
        self._sessions: dict[Role, ctypes.c_void_p] = {"prefill": prefill, "decode": decode}
        release_code()

        self._lengths = (ctypes.c_int32 * (batch_size + 1))()
        self._positions = (ctypes.c_int64 * batch_size)()
        self._token = (ctypes.c_int64 * batch_size)()
        self._logits = (ctypes.c_float * (batch_size * bundle.model.vocab_size))()
        self.next_token = memoryview(self._token).cast("B").cast("q")
        count = ctypes.c_size_t
        self._run = library.function("Run", pointer, pointer, pointer, pointer, count, pointer, count, pointer)
        self._kv: list[mmap.mmap] = []
        self._calls: dict[tuple[Role, int | None, int], _Call] = {}
        self._set_lengths([0] * batch_size)
        self.reserve(1)

    @functools.cached_property
    def logits(self) -> np.ndarray:
        import numpy as np  # only who reads logits pays for it

        return np.frombuffer(memoryview(self._logits), np.float32).reshape(self.batch_size, -1)

    @property
    def cache_bytes(self) -> int:
        return sum(len(buffer) for buffer in self._kv)

    def step(self) -> None:
        lengths, positions, rows = self._lengths, self._positions, self.batch_size
        if lengths[rows] >= self.capacity:
            self._make_room()
        lengths[rows] += 1
        for row in range(rows):
            lengths[row] += 1
            positions[row] += 1
        status = self._run(*self._step_arguments)
        if status:
            self._library.check(status)

    def _allocate(self, capacity: int, used: int) -> None:
        heads = self.batch_size * self.bundle.model.num_kv_heads
        position_bytes = self.bundle.model.head_dim * (1 if self.bundle.kv_dtype == "int8" else 4)
        old_bytes, new_bytes = self.capacity * position_bytes, capacity * position_bytes
        old, self._kv, self.capacity = self._kv, [], capacity
        self._calls.clear()
        if not used:
            old.clear()
        for _ in range(2 * self.bundle.model.num_layers):
            # Anonymous pages: zero, aligned, and a forked process has its own. They take no memory before they are
            # touched, 2 MB at a time where the system gives huge pages unasked.
            try:
                buffer = mmap.mmap(-1, heads * new_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise MemoryError(f"keys and values of {capacity} tokens: {error.strerror}") from error
            if used:
                before = memoryview(old.pop(0))  # and gone with the next, so that one is there twice and not all
                after, size = memoryview(buffer), used * position_bytes
                for head in range(heads):
                    after[head * new_bytes :][:size] = before[head * old_bytes :][:size]
            self._kv.append(buffer)
        self._step = self._bind(self._decode, self._token, self._positions, 1, None)
        self._step_arguments = self._step.arguments

    def _run_graph(self, role: Role, rows: Sequence[Sequence[int]], row: int | None) -> None:
        num_tokens = len(rows[0])
        call = self._calls.get((role, row, num_tokens))
        if call is None:
            if len(self._calls) >= self._kept_calls:
                self._calls.clear()
            ids, positions = ((ctypes.c_int64 * (len(rows) * num_tokens))() for _ in range(2))
            call = self._bind(self._sessions[role], ids, positions, num_tokens, row)
            self._calls[role, row, num_tokens] = call
        call.ids[:] = [token for tokens in rows for token in tokens]
        if self.bundle.position_ids:
            last = self._lengths[row or 0]
            call.positions[:] = [*range(last + 1 - num_tokens, last + 1)] * len(rows)
        try:
            self._library.check(self._run(*call.arguments))
        except BundleError as error:
            path = self.bundle.path / self.bundle.graphs[role]
            raise BundleError(f"{path}: onnxruntime cannot run it: {error}") from error

    def _copy_rows(self, source_rows: Sequence[int], length: int) -> None:
        for buffer in self._kv:
            view = memoryview(buffer)
            row_bytes = len(view) // self.batch_size
            head_bytes = row_bytes // self.bundle.model.num_kv_heads
            used_bytes = head_bytes // self.capacity * length
            for first in range(0, row_bytes, head_bytes):
                _copy_parts(view, first, row_bytes, used_bytes, source_rows)
        for array in (self._token, self._logits):
            view = memoryview(array).cast("B")
            size = len(view) // self.batch_size
            _copy_parts(view, 0, size, size, source_rows)

    def _load(self, role: str) -> ctypes.c_void_p:
        """The session of a graph; it must have the inputs and outputs that will be bound."""
        library, bundle = self._library, self.bundle
        path = bundle.path / bundle.graphs[role]
        session = library.load_session(path, self.threads)
        self._handles.append(("ReleaseSession", session))
        caches = 2 * bundle.model.num_layers
        for name, expected in (
            ("SessionGetInputCount", 3 + bundle.position_ids + caches),
            ("SessionGetOutputCount", 2 + caches),
        ):
            found = library.count(name, session)
            if found != expected:
                raise BundleError(f"{path}: {name} gives {found}, the manifest makes it {expected}")
        return session

    def _bind(self, session: ctypes.c_void_p, ids: Int64s, positions: Int64s, length: int, row: int | None) -> _Call:
        """A call of `session` for all rows, or for one, over this engine's buffers."""
        shape, address = self.bundle.model, ctypes.addressof
        first, rows = (0, self.batch_size) if row is None else (row, 1)
        inputs: dict[str, Place] = {
            "input_ids": (address(ids), (rows, length), INT64),
            "seqlens_k": (address(self._lengths) + 4 * first, (rows,), INT32),
            "total_sequence_length": (address(self._lengths) + 4 * self.batch_size, (), INT32),
        }
        if self.bundle.position_ids:
            inputs["position_ids"] = (address(positions), (rows, length), INT64)
        outputs: dict[str, Place] = {
            "next_token": (address(self._token) + 8 * first, (rows, 1), INT64),
            "logits": (address(self._logits) + 4 * first * shape.vocab_size, (rows, 1, shape.vocab_size), FLOAT),
        }
        kind = INT8 if self.bundle.kv_dtype == "int8" else FLOAT
        names = [f"{layer}.{part}" for layer in range(shape.num_layers) for part in ("key", "value")]
        for name, buffer in zip(names, self._kv):
            place = address(ctypes.c_char.from_buffer(buffer)) + first * (len(buffer) // self.batch_size)
            cache = place, (rows, shape.num_kv_heads, self.capacity, shape.head_dim), kind
            inputs[f"past_key_values.{name}"] = outputs[f"present.{name}"] = cache
        return _Call(self._library, session, inputs, outputs, ids, positions)


Int64s = ctypes.Array[ctypes.c_int64]


class _Call:
    """Run's arguments, and all that they point to for as long as they may be used."""

    def __init__(
        self,
        library: Library,
        session: ctypes.c_void_p,
        inputs: Mapping[str, Place],
        outputs: Mapping[str, Place],
        ids: Int64s,
        positions: Int64s,
    ):
        self.ids = ids
        self.positions = positions
        # What is input and output at once, a cache or the fed-back token, is one tensor.
        tensors = {place: library.make_tensor(*place) for place in {*inputs.values(), *outputs.values()}}
        handles = [("ReleaseValue", tensor) for tensor in tensors.values()]
        weakref.finalize(self, _release_all, library, handles).atexit = False
        self._arrays = [
            array
            for places in (inputs, outputs)
            for array in (
                (ctypes.c_char_p * len(places))(*(name.encode() for name in places)),
                (ctypes.c_void_p * len(places))(*(tensors[place].value for place in places.values())),
            )
        ]
        names_in, values_in, names_out, values_out = (pointer(ctypes.addressof(array)) for array in self._arrays)
        count = ctypes.c_size_t
        inputs_in = (names_in, values_in, count(len(inputs)))
        self.arguments = (session, None, *inputs_in, names_out, count(len(outputs)), values_out)


def _copy_parts(view: memoryview, first: int, stride: int, size: int, source_rows: Sequence[int]) -> None:
    """In a buffer of rows `stride` bytes apart, copy `size` bytes from `first` on, each row from its source."""
    parts = {row: bytes(view[first + row * stride :][:size]) for row in set(source_rows)}
    for row, source in enumerate(source_rows):
        if row != source:
            view[first + row * stride :][:size] = parts[source]


def _release_all(library: Library, handles: Sequence[tuple[str, ctypes.c_void_p]]) -> None:
    for name, handle in handles:
        library.release(name, handle)
