"""The engine over onnxruntime's Python binding: bound buffers, keys and values updated in place, tokens fed back.

Nothing is allocated or copied in a step. One OrtValue is both `past_key_values.N.key` and `present.N.key`; the
output `next_token` is bound to the buffer that the next step reads as `input_ids`, so a greedy token never passes
through Python. Prompt and steps may be two graphs (two sessions) over the same key and value buffers.

Shapes: B rows (sequences decoded together), S prompt tokens, T longest sequence, K key-value heads, H head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ryot.edge.bundle import Bundle, check_onnxruntime
from ryot.edge.engine import Engine
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
#: Bindings kept for prompt lengths already seen; a service with many lengths makes them anew.
MAX_PROMPT_BINDINGS = 8
#: Buffers start on cache-line boundaries, which numpy does not promise.
ALIGNMENT_BYTES = 64


class Decoder(Engine):
    """An `Engine` through onnxruntime's Python binding."""

    def __init__(self, bundle: Bundle, *, threads: int = 1, batch_size: int = 1, max_len: int | None = None):
        """Load the graphs and make the buffers.

        Raises like `Engine`, and `BundleError` when onnxruntime is too old for the bundle or cannot load it.
        """
        self.onnxruntime_version = ort.__version__
        check_onnxruntime(ort.__version__, bundle.onnxruntime_min)
        super().__init__(bundle, threads=threads, batch_size=batch_size, max_len=max_len)
        shape = bundle.model
        self._decode = _load_session(bundle.path / bundle.graphs["decode"], threads)
        self._prefill = (
            self._decode if bundle.one_session else _load_session(bundle.path / bundle.graphs["prefill"], threads)
        )
        kv_shape = (batch_size, shape.num_kv_heads, self.max_len, shape.head_dim)
        self._kv = {
            f"{layer}.{part}": _aligned(kv_shape, np.dtype(bundle.kv_dtype))
            for layer in range(shape.num_layers)
            for part in ("key", "value")
        }
        # In one array, so that one addition moves all on.
        self._lengths = _aligned((batch_size + 1,), np.dtype(np.int32))
        self._positions = _aligned((batch_size,), np.dtype(np.int64))
        self._token = _aligned((batch_size, 1), np.dtype(np.int64))
        self._logits = _aligned((batch_size, 1, shape.vocab_size), np.dtype(np.float32))
        self._prompt = _aligned((batch_size * self.max_len,), np.dtype(np.int64))
        self._prompt_bindings: dict[tuple[int | None, int], ort.IOBinding] = {}
        self._step_binding = self._bind(self._decode, self._token, self._positions[:, None], slice(None))
        self.next_token = self._token[:, 0]

    @property
    def logits(self) -> np.ndarray:
        return self._logits[:, 0]

    def step(self) -> None:
        if self._lengths[-1] >= self.max_len:
            self._raise_full()
        self._lengths += 1
        self._positions += 1
        self._decode.run_with_iobinding(self._step_binding)

    def _run_prompt(self, rows: list[list[int]], row: int | None) -> None:
        length = len(rows[0])
        ids = self._prompt[: len(rows) * length].reshape(len(rows), length)
        ids[:] = rows
        binding = self._prompt_bindings.get((row, length))
        if binding is None:
            if len(self._prompt_bindings) >= MAX_PROMPT_BINDINGS:
                self._prompt_bindings.clear()
            positions = np.tile(np.arange(length, dtype=np.int64), (len(rows), 1))
            which = slice(None) if row is None else slice(row, row + 1)
            binding = self._prompt_bindings[row, length] = self._bind(self._prefill, ids, positions, which)
        try:
            self._prefill.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            path = self.bundle.path / self.bundle.graphs["prefill"]
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


def build_session_options(threads: int) -> ort.SessionOptions:
    """Options for one decoder on `threads` cores that it may not have for itself.

    No spinning: threads that wait actively take the core from whoever shares it. No arena: it keeps what the
    prompt needed once, and the steps gain nothing from it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _load_session(path: Path, threads: int) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(path, build_session_options(threads), providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path}: onnxruntime {ort.__version__} cannot load it: {reason}") from error


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros whose first byte is on a cache line; pages that are never touched cost no memory."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def _alias(array: np.ndarray) -> ort.OrtValue:
    """An OrtValue over the array's own memory."""
    value = ort.OrtValue.ortvalue_from_numpy(array)
    assert value.data_ptr() == array.ctypes.data, "onnxruntime copied a buffer that it should share"
    return value
