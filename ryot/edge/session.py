"""The decoder as onnxruntime runs it: bound buffers, keys and values updated in place, greedy tokens fed back inside.

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
from ryot.errors import BundleError, ConfigError, ContextError

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


class Decoder:
    """One bundle, loaded and ready: `prefill` a prompt for every row, then `step` a token at a time.

    After either call `next_token` [B] holds the greedy choice and `logits` [B, V] what it was chosen from. Both are
    views of the runtime's own buffers. Writing into `next_token` before `step` replaces the greedy choice.

    A dynamic-int8 graph takes one scale for all rows of a call, so there a row's logits depend, within the
    quantization's error, on its neighbours. Other precisions compute each row by itself.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1, batch_size: int = 1, max_len: int | None = None):
        """Load the graphs and make the buffers for `batch_size` rows of `max_len` tokens (default: the context's).

        Raises `BundleError` when the files differ from the manifest or onnxruntime cannot load them, `ConfigError`
        for a size that makes no sense.
        """
        shape = bundle.model
        max_len = shape.context_length if max_len is None else max_len
        check_sizes(bundle, threads=threads, batch_size=batch_size, max_len=max_len)
        check_onnxruntime(ort.__version__, bundle.onnxruntime_min)
        bundle.check_graph_files("prefill", "decode")
        self.bundle = bundle
        self.threads = threads
        self.batch_size = batch_size
        self.max_len = max_len
        self._decode = _load_session(bundle.path / bundle.graphs["decode"], threads)
        self._prefill = (
            self._decode if bundle.one_session else _load_session(bundle.path / bundle.graphs["prefill"], threads)
        )
        kv_dtype = np.dtype(bundle.kv_dtype)
        kv_shape = (batch_size, shape.num_kv_heads, max_len, shape.head_dim)
        self._kv = {
            f"{layer}.{part}": _aligned(kv_shape, kv_dtype)
            for layer in range(shape.num_layers)
            for part in ("key", "value")
        }
        # Per row the index of the last token, and behind them the longest row's length: one addition moves all on.
        self._lengths = _aligned((batch_size + 1,), np.dtype(np.int32))
        self._token = _aligned((batch_size, 1), np.dtype(np.int64))
        self._logits = _aligned((batch_size, 1, shape.vocab_size), np.dtype(np.float32))
        self._prompt = _aligned((batch_size * max_len,), np.dtype(np.int64))
        self._positions = _aligned((batch_size, 1), np.dtype(np.int64))
        self._prompt_bindings: dict[tuple[int | None, int], ort.IOBinding] = {}
        self._step_binding = self._bind(self._decode, self._token, self._positions, slice(None))
        #: [B] the token that the next step reads.
        self.next_token = self._token[:, 0]
        #: [B, V] logits after the last token.
        self.logits = self._logits[:, 0]

    @property
    def position(self) -> int:
        """Tokens held for the longest row."""
        return int(self._lengths[-1])

    def prefill(self, ids_BS: Sequence[Sequence[int]] | np.ndarray) -> None:
        """Start over with one prompt a row, each of at least one token.

        Prompts of one length go through the graph together, prompts of several lengths one after the other.
        Raises `ContextError` for a prompt longer than `max_len`, `BundleError` for an id outside the vocabulary.
        """
        assert len(ids_BS) == self.batch_size, f"{len(ids_BS)} prompts for {self.batch_size} rows"
        lengths = [len(row) for row in ids_BS]
        self._check_prompt(min(lengths), max(lengths))
        if min(lengths) == max(lengths):
            self._run_prompt(np.asarray(ids_BS, dtype=np.int64), None)
        else:
            for row, ids in enumerate(ids_BS):
                self._run_prompt(np.asarray([ids], dtype=np.int64), row)
        self._set_lengths(lengths)

    def prefill_shared(self, ids_S: Sequence[int] | np.ndarray) -> None:
        """Start over with the same prompt in every row; it is computed once and its keys and values are copied."""
        length = len(ids_S)
        self._check_prompt(length, length)
        self._run_prompt(np.asarray([ids_S], dtype=np.int64), 0)
        for buffer in self._kv.values():
            buffer[1:, :, :length] = buffer[0, :, :length]
        self._token[1:] = self._token[0]
        self._logits[1:] = self._logits[0]
        self._set_lengths([length] * self.batch_size)

    def step(self) -> None:
        """Feed `next_token` and compute the token after it. Raises `ContextError` at the end of the buffers."""
        if self._lengths[-1] >= self.max_len:
            raise ContextError(f"the context of {self.max_len} tokens is full", hint=self._context_hint())
        self._lengths += 1
        self._positions += 1
        self._decode.run_with_iobinding(self._step_binding)

    def keep_rows(self, source_rows: Sequence[int]) -> None:
        """Make row i a copy of what row `source_rows[i]` was: its keys, values, length, token and logits."""
        source = np.asarray(source_rows)
        assert source.shape == (self.batch_size,)
        length = self.position
        for buffer in self._kv.values():
            buffer[:, :, :length] = buffer[source, :, :length]
        for array in (self._token, self._logits, self._positions):
            array[:] = array[source]
        self._lengths[:-1] = self._lengths[:-1][source]
        self._lengths[-1] = self._lengths[:-1].max() + 1

    def _run_prompt(self, ids_BS: np.ndarray, row: int | None) -> None:
        """Run the prompt graph for all rows, or for one."""
        vocab_size = self.bundle.model.vocab_size
        if ids_BS.min() < 0 or ids_BS.max() >= vocab_size:
            raise BundleError(f"prompt: a token id is outside the vocabulary, 0 to {vocab_size - 1}")
        rows, length = ids_BS.shape
        self._prompt[: rows * length] = ids_BS.reshape(-1)
        self._lengths[:-1] = length - 1
        self._lengths[-1] = length
        binding = self._prompt_bindings.get((row, length))
        if binding is None:
            if len(self._prompt_bindings) >= MAX_PROMPT_BINDINGS:
                self._prompt_bindings.clear()
            ids = self._prompt[: rows * length].reshape(rows, length)
            positions = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
            which = slice(None) if row is None else slice(row, row + 1)
            binding = self._prompt_bindings[row, length] = self._bind(self._prefill, ids, positions, which)
        try:
            self._prefill.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            path = self.bundle.path / self.bundle.graphs["prefill"]
            raise BundleError(f"{path}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from error

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

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self._lengths[:-1] = lengths
        self._lengths[:-1] -= 1
        self._lengths[-1] = max(lengths)
        self._positions[:, 0] = self._lengths[:-1]

    def _check_prompt(self, shortest: int, longest: int) -> None:
        assert shortest > 0, "a prompt has at least one token"
        if longest > self.max_len:
            raise ContextError(
                f"the prompt has {longest} tokens, the context holds {self.max_len}", hint=self._context_hint()
            )

    def _context_hint(self) -> str:
        if self.max_len < self.bundle.model.context_length:
            return f"the model's context has {self.bundle.model.context_length} tokens; load it with a larger max_len"
        return "shorten the prompt, or ask for fewer tokens"


def check_sizes(bundle: Bundle, *, threads: int, batch_size: int, max_len: int) -> None:
    """Raise `ConfigError` for a thread count, batch size or length that no session can have."""
    for name, value in (("threads", threads), ("batch_size", batch_size), ("max_len", max_len)):
        if value < 1:
            raise ConfigError(f"{name}: got {value}, expected a whole number above 0")
    if max_len > bundle.model.context_length:
        raise ConfigError(
            f"max_len: got {max_len}, expected at most the context of {bundle.model.context_length} tokens"
        )


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
