"""Rows of one engine that sequences take and leave: only the first ones are stepped, and both sides of the cache grow.

An `Engine` steps all its rows. Here `step_rows(n)` steps rows 0 to n - 1 and leaves the others as they are, so that a
step costs what its sequences cost. The key and value buffers hold `num_rows` rows of `capacity` positions; both numbers
change with what is needed, and their product stays below `memory_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from ryot.edge.bundle import Bundle
from ryot.edge.engine import FIRST_CAPACITY
from ryot.edge.session import ORT_ERRORS, OnnxruntimeEngine, aligned_zeros, bind_array, load_session
from ryot.errors import BundleError, ConfigError


class SlotEngine(OnnxruntimeEngine):
    """An engine of up to `batch_size` rows. Rows that hold a sequence come first; the caller keeps them so."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        memory_bytes: int,
        threads: int = 1,
        batch_size: int = 1,
        max_len: int | None = None,
    ):
        """Raises like `OnnxruntimeEngine`, and `ConfigError` where the memory cannot hold one sequence of `max_len`."""
        #: Rows that the buffers hold.
        self.num_rows = 1
        self.memory_bytes = memory_bytes
        self._steps: dict[int, ort.IOBinding] = {}
        #: The standard graph, which gives the logits of all positions; see `open_checker`.
        self._checker: ort.InferenceSession | None = None
        self._checks: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray, ort.IOBinding]] = {}
        length = bundle.model.context_length if max_len is None else max_len
        needed = bundle.model.kv_cache_bytes(length, 1, np.dtype(bundle.kv_dtype).itemsize)
        if needed > memory_bytes:
            raise ConfigError(
                f"memory for keys and values: got {memory_bytes / 1e6:.1f} MB, expected at least "
                f"{needed / 1e6:.1f} MB, what one sequence of {length} tokens needs",
                hint="give more memory, or a smaller context",
            )
        super().__init__(bundle, threads=threads, batch_size=batch_size, max_len=max_len)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token."""
        return self.bundle.model.kv_cache_bytes(1, 1, np.dtype(self.bundle.kv_dtype).itemsize)

    def longest(self, count: int) -> int:
        """Tokens of the longest of the first `count` rows."""
        return int(self._lengths[:count].max()) + 1

    def step_rows(self, count: int) -> None:
        """Feed `next_token` of the first `count` rows and compute the tokens after them.

        There must be room: see `make_room`. Raises `BundleError` where onnxruntime fails.
        """
        lengths = self._lengths[:count]
        lengths += 1
        self._positions[:count] += 1
        self._lengths[-1] = longest = int(lengths.max()) + 1
        assert longest <= self.capacity and count <= self.num_rows
        binding = self._steps.get(count)
        if binding is None:
            positions = self._positions[:count, None]
            binding = self._steps[count] = self._bind(self._decode, self._token[:count], positions, slice(0, count))
        try:
            self._decode.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise BundleError(f"{self.bundle.path}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from error

    @property
    def can_check(self) -> bool:
        """Whether `check_tokens` may be called."""
        return self._checker is not None

    def open_checker(self) -> None:
        """Load what `check_tokens` needs: the weights once more, unless all tokens of a call share a scale.

        Another thread may do that while this engine works. Raises `BundleError` where it cannot be loaded, or the
        folder holds another bundle by now.
        """
        if not self.bundle.shared_scale:
            path = self.bundle.path / self.bundle.graphs["standard"]
            checker = load_session(path, self.threads, prepack=True)
            self.bundle.check_in_place()
            self._checker = checker

    def close_checker(self) -> None:
        """Give back what `open_checker` loaded."""
        self._checker = None
        self._checks.clear()

    def check_tokens(self, tokens: Sequence[int], row: int) -> np.ndarray:
        """Feed tokens behind what a row holds; the logits [S, V] after each. There must be room: see `make_room`."""
        assert self._checker is not None
        start = self.lengths[row]
        stop = start + len(tokens)
        assert stop <= self.capacity
        found = self._checks.get((row, len(tokens)))
        if found is None:
            binding = self._checker.io_binding()
            ids, positions = (aligned_zeros((1, len(tokens)), np.dtype(np.int64)) for _ in range(2))
            logits = aligned_zeros((1, len(tokens), self.bundle.model.vocab_size), np.dtype(np.float32))
            bind_array(binding, "input_ids", ids)
            if self.bundle.position_ids:
                bind_array(binding, "position_ids", positions)
            bind_array(binding, "logits", logits, output=True)
            for name, buffer in self._kv.items():
                bind_array(binding, f"past_key_values.{name}", buffer[row : row + 1])
                bind_array(binding, f"present.{name}", buffer[row : row + 1], output=True)
            found = self._checks[row, len(tokens)] = (ids, positions, logits, binding)
        ids, positions, logits, binding = found
        ids[0] = tokens
        positions[0] = np.arange(start, stop)
        bind_array(binding, "attention_mask", self._ones[:, :stop])
        try:
            self._checker.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise BundleError(f"{self.bundle.path}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from error
        self._lengths[row] = self._positions[row] = stop - 1
        return np.asarray(logits[0])

    def step(self) -> None:
        self.make_room(self.batch_size, self.position + 1)
        self.step_rows(self.batch_size)

    def make_room(self, rows: int, length: int) -> bool:
        """Hold `rows` rows of `length` tokens and what is there; False, and nothing changed, where memory forbids.

        Capacity shrinks where that is what makes room for another row.
        """
        assert length <= self.max_len
        if rows <= self.num_rows and length <= self.capacity:
            return True
        # More than asked, so that rows that come one by one do not copy everything each time.
        ample = min(max(rows, 2 * self.num_rows if rows > self.num_rows else self.num_rows), self.batch_size)
        longest = max(length, *self.lengths)
        for capacity in (max(self.capacity, self._round_up(longest)), self._round_up(longest)):
            for count in (ample, rows):
                if count <= self.batch_size and count * capacity * self.bytes_per_token <= self.memory_bytes:
                    self._resize(count, capacity)
                    return True
        return False

    def clear_row(self, row: int) -> None:
        """Forget what a row holds."""
        self._lengths[row] = self._positions[row] = -1

    def release(self) -> None:
        """Forget all rows and give back their memory, whatever state a failure left it in."""
        self._set_lengths([0] * self.batch_size)
        self._kv.clear()
        self.num_rows, self.capacity = 1, 0
        self._resize(1, self._round_up(1))

    def reload(self) -> None:
        """Open the graphs again, whose weights have changed on disk; all rows are forgotten. Raises `BundleError`."""
        self._calls.clear()
        self._steps.clear()
        self._load_sessions(prepack=True)
        self.release()

    def move_row(self, source: int, target: int) -> None:
        """Make row `target` what row `source` is, token and logits included, and `source` an empty one."""
        length = self._lengths[source] + 1
        for buffer in self._kv.values():
            buffer[target, :, :length] = buffer[source, :, :length]
        for array in (self._token, self._logits, self._positions):
            array[target] = array[source]
        self._lengths[target] = self._lengths[source]
        self.clear_row(source)

    def set_logits(self, row: int, logits_V: np.ndarray, token: int) -> None:
        """Say what follows a row's last token, where that is known."""
        self._logits[row, 0], self._token[row, 0] = logits_V, token

    def read_values(self, row: int, start: int, stop: int) -> np.ndarray:
        """A copy of the keys and values of a row's tokens `start` to `stop`, [2 * layers, K, stop - start, H]."""
        return np.stack([buffer[row, :, start:stop] for buffer in self._kv.values()])

    def write_values(self, row: int, start: int, values: np.ndarray) -> None:
        """Put what `read_values` gave behind the first `start` tokens of a row, which ends there then."""
        stop = start + values.shape[2]
        for buffer, part in zip(self._kv.values(), values, strict=True):
            buffer[row, :, start:stop] = part
        self._lengths[row] = self._positions[row] = stop - 1

    def _round_up(self, length: int) -> int:
        capacity = FIRST_CAPACITY
        while capacity < length:
            capacity *= 2
        return min(capacity, self.max_len)

    def reserve(self, length: int) -> None:
        if not self.make_room(self.num_rows, max(length, 1)):
            raise BundleError(f"keys and values of {length} tokens in {self.num_rows} rows do not fit the memory limit")

    def _resize(self, num_rows: int, capacity: int) -> None:
        rows, used = min(num_rows, self.num_rows), min(capacity, max(self.lengths))
        shape = self.bundle.model
        # What is bound would keep the old buffers.
        self._calls.clear()
        self._steps.clear()
        self._checks.clear()
        for layer in range(shape.num_layers):
            for part in ("key", "value"):
                name = f"{layer}.{part}"
                buffer = aligned_zeros(
                    (num_rows, shape.num_kv_heads, capacity, shape.head_dim), np.dtype(self.bundle.kv_dtype)
                )
                if used and self._kv:
                    buffer[:rows, :, :used] = self._kv[name][:rows, :, :used]
                self._kv[name] = buffer
        self.num_rows, self.capacity = num_rows, capacity
        self._ones = aligned_zeros((1, capacity), np.dtype(np.int64))
        self._ones[:] = 1
