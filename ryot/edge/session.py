"""The engine over onnxruntime's Python binding: bound buffers, keys and values updated in place, tokens fed back.

Nothing is allocated or copied in a step. One OrtValue is both `past_key_values.N.key` and `present.N.key`; the
output `next_token` is bound to the buffer that the next step reads as `input_ids`, so a greedy token never passes
through Python. Prefill and decode may be two graphs (two sessions) over the same key and value buffers.

Shapes: B rows (sequences decoded together), S new tokens, T positions in the buffers, K key-value heads, H head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ryot.edge.bundle import Bundle, check_onnxruntime
from ryot.edge.engine import (
    ALIGNMENT_BYTES,
    GRAPH_OPTIMIZATION_LEVEL,
    INTER_OP_THREADS,
    LOG_ERRORS_ONLY,
    SESSION_CONFIG,
    Engine,
    Role,
)
from ryot.edge.pages import release_code
from ryot.errors import BundleError

#: What onnxruntime raises for a graph, or weights, that it cannot load or run.
ORT_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


class _Call(NamedTuple):
    """Inputs [B, S] that are bound to a graph, and the binding."""

    ids: np.ndarray
    positions: np.ndarray
    binding: ort.IOBinding


class OnnxruntimeEngine(Engine):
    """An `Engine` through onnxruntime's Python binding."""

    name = "python"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 1,
        batch_size: int = 1,
        max_len: int | None = None,
        prepack: bool = True,
    ):
        """Load the graphs and make the buffers; `prepack` is as for `build_session_options`.

        Raises like `Engine`, and `BundleError` when onnxruntime is too old for the bundle or cannot load it.
        """
        self.onnxruntime_version = ort.__version__
        check_onnxruntime(ort.__version__, bundle.onnxruntime_min)
        super().__init__(bundle, threads=threads, batch_size=batch_size, max_len=max_len)
        self._load_sessions(prepack)
        release_code()
        # In one array, so that one addition moves all on.
        self._lengths = aligned_zeros((batch_size + 1,), np.dtype(np.int32))
        self._positions = aligned_zeros((batch_size,), np.dtype(np.int64))
        self._token = aligned_zeros((batch_size, 1), np.dtype(np.int64))
        self._logits = aligned_zeros((batch_size, 1, bundle.model.vocab_size), np.dtype(np.float32))
        self.next_token = self._token.data.cast("B").cast("q")
        self._kv: dict[str, np.ndarray] = {}
        self._calls: dict[tuple[Role, int | None, int], _Call] = {}
        self._set_lengths([0] * batch_size)
        self.reserve(1)

    def _load_sessions(self, prepack: bool) -> None:
        bundle, threads = self.bundle, self.threads
        decode = prefill = load_session(bundle.path / bundle.graphs["decode"], threads, prepack)
        if not bundle.one_session:
            prefill = load_session(bundle.path / bundle.graphs["prefill"], threads, prepack)
        self._sessions: dict[Role, ort.InferenceSession] = {"prefill": prefill, "decode": decode}
        self._decode = decode

    @property
    def logits(self) -> np.ndarray:
        return self._logits[:, 0]

    @property
    def cache_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._kv.values())

    def step(self) -> None:
        if self._lengths[-1] >= self.capacity:
            self._make_room()
        self._lengths += 1
        self._positions += 1
        self._decode.run_with_iobinding(self._step_binding)

    def _allocate(self, capacity: int, used: int) -> None:
        shape, self.capacity = self.bundle.model, capacity
        # What is bound would keep the old buffers.
        self._calls.clear()
        self._step_binding = self._decode.io_binding()
        for layer in range(shape.num_layers):
            for part in ("key", "value"):
                # One buffer after the other, so that two of them are there twice and not the whole cache.
                buffer = aligned_zeros(
                    (self.batch_size, shape.num_kv_heads, capacity, shape.head_dim), np.dtype(self.bundle.kv_dtype)
                )
                if used:
                    buffer[:, :, :used] = self._kv[f"{layer}.{part}"][:, :, :used]
                self._kv[f"{layer}.{part}"] = buffer
        self._step_binding = self._bind(self._decode, self._token, self._positions[:, None], slice(None))

    def _run_graph(self, role: Role, rows: Sequence[Sequence[int]], row: int | None) -> None:
        session, num_tokens = self._sessions[role], len(rows[0])
        call = self._calls.get((role, row, num_tokens))
        if call is None:
            if len(self._calls) >= self._kept_calls:
                self._calls.clear()
            ids, positions = (aligned_zeros((len(rows), num_tokens), np.dtype(np.int64)) for _ in range(2))
            which = slice(None) if row is None else slice(row, row + 1)
            call = _Call(ids, positions, self._bind(session, ids, positions, which))
            self._calls[role, row, num_tokens] = call
        call.ids[:] = rows
        if self.bundle.position_ids:
            last = self._lengths[row or 0]
            call.positions[:] = np.arange(last + 1 - num_tokens, last + 1)
        try:
            session.run_with_iobinding(call.binding)
        except ORT_ERRORS as error:
            path = self.bundle.path / self.bundle.graphs[role]
            raise BundleError(f"{path}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from error

    def _copy_rows(self, source_rows: Sequence[int], length: int) -> None:
        source = np.asarray(source_rows)
        for buffer in self._kv.values():
            buffer[:, :, :length] = buffer[source, :, :length]
        for array in (self._token, self._logits):
            array[:] = array[source]

    def _bind(
        self, session: ort.InferenceSession, ids: np.ndarray, positions: np.ndarray, rows: slice
    ) -> ort.IOBinding:
        """Bind inputs and outputs of `session` for `rows`; the OrtValues alias the arrays."""
        binding = session.io_binding()
        lengths = self._lengths
        binding.bind_ortvalue_input("input_ids", _alias(ids))
        binding.bind_ortvalue_input("seqlens_k", _alias(lengths[:-1][rows]))
        binding.bind_ortvalue_input("total_sequence_length", _alias(lengths[-1:].reshape(())))
        if self.bundle.position_ids:
            binding.bind_ortvalue_input("position_ids", _alias(positions))
        for name, buffer in self._kv.items():
            value = _alias(buffer[rows])
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_ortvalue_output("next_token", _alias(self._token[rows]))
        binding.bind_ortvalue_output("logits", _alias(self._logits[rows]))
        return binding


def build_session_options(threads: int, *, prepack: bool = True) -> ort.SessionOptions:
    """The options of every engine's sessions; `engine` says why these.

    Without `prepack` weights are multiplied as they lie in their file: slower, far slower where they are quantized, and
    without a second copy of float32 ones in memory.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel(GRAPH_OPTIMIZATION_LEVEL)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = INTER_OP_THREADS
    options.enable_cpu_mem_arena = False
    options.log_severity_level = LOG_ERRORS_ONLY
    for name, value in SESSION_CONFIG.items():
        options.add_session_config_entry(name, value)
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def load_session(path: Path, threads: int, prepack: bool) -> ort.InferenceSession:
    """A session of a graph. Raises `BundleError` when onnxruntime cannot load it."""
    try:
        return ort.InferenceSession(
            path, build_session_options(threads, prepack=prepack), providers=["CPUExecutionProvider"]
        )
    except ORT_ERRORS as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path}: onnxruntime {ort.__version__} cannot load it: {reason}") from error


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros whose first byte is on a cache line; pages that are never touched cost no memory."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def bind_array(binding: ort.IOBinding, name: str, array: np.ndarray, *, output: bool = False) -> None:
    """Bind an input, or an output, to the array's own memory."""
    (binding.bind_ortvalue_output if output else binding.bind_ortvalue_input)(name, _alias(array))


def _alias(array: np.ndarray) -> ort.OrtValue:
    """An OrtValue over the array's own memory."""
    value = ort.OrtValue.ortvalue_from_numpy(array)
    assert value.data_ptr() == array.ctypes.data, "onnxruntime copied a buffer that it should share"
    return value
