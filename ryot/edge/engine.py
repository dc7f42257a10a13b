"""What every engine does for a caller, apart from how it reaches onnxruntime.

`session` goes through onnxruntime's Python binding and numpy, `capi` through its C library without either;
`engines` chooses between them.

A bundle's context is a limit, not an allocation. The key and value buffers of all rows hold `capacity` positions; where
more are needed they grow to twice that, and what they held is copied. Between two growths nothing is allocated. Tokens
that come at once, a prompt or a further turn, go through the graph in pieces of at most `PIECE_TOKENS`, so that what a
graph needs beside the cache is bounded too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from ryot.edge.bundle import Bundle
from ryot.edge.pages import MIN_WEIGHT_BYTES, move_to_huge_pages
from ryot.errors import BundleError, ConfigError, ContextError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Ids: TypeAlias = "Sequence[int] | NDArray[np.int64]"
"""Token ids of one sequence: any sequence of integers, a numpy array included."""
Role = Literal["prefill", "decode"]

#: Calls of as many shapes stay bound to the graphs; a service with more binds them anew.
KEPT_CALLS = 8
#: Positions that the buffers begin with, where the context has more.
FIRST_CAPACITY = 256
#: The most tokens of a sequence that go through a graph in one call, where the graph takes tokens that have a past.
#: Of 128, 256, 512, 1024 and 2048, at the width of a model of 135 M parameters and 8 and 4 bits, 256 took the least
#: time for prompts of 512 and of 2047 tokens (there a quarter less than in one call), and less memory than those above.
PIECE_TOKENS = 256

# How every engine sets its sessions up, for one sequence generator on cores that it may not have for itself. Between
# the hundreds of products of a step threads wait actively, but for 20 us at most and not between calls: a step of
# SmolLM2-135M in int8-dyn takes 7.5 ms on two cores, 13.4 where they sleep; with a busy program on one of the two 14.1,
# 12.3 where they sleep and up to 16.0 where they wait without an end (2026-11-27). No arena: it keeps what the prompt
# needed once, and the steps gain nothing from it. No optimizations: the export has fused what can be fused (graphs of
# all families have the same nodes behind onnxruntime's, but for three additions of GPT-2), and looking for more takes
# time.
GRAPH_OPTIMIZATION_LEVEL = 0
INTER_OP_THREADS = 1
LOG_ERRORS_ONLY = 3
SESSION_CONFIG = {
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "20",
    "session.force_spinning_stop": "1",
}
#: Buffers start on cache-line boundaries, which neither numpy nor ctypes promises.
ALIGNMENT_BYTES = 64


class EngineUnavailable(BundleError):
    """This engine cannot run here; another one may."""


class Engine(ABC):
    """One bundle, loaded and ready: `prefill` a prompt for every row, then `step` a token at a time.

    After either call `next_token` [B] holds the greedy choice and `logits` [B, V] what it was chosen from. Both are
    views of the runtime's own buffers. Writing into `next_token` before `step` replaces the greedy choice. `extend` and
    `truncate` change a row's end, so that a conversation goes on, or another one with the same beginning starts,
    without computing anew what they share.

    Each token is computed by itself, but in bundles of before, whose dynamic-int8 graphs take one scale for all tokens
    of a call (`Bundle.shared_scale`): there a row's logits depend, within the quantization's error, on its neighbours
    and on where a prompt was cut into pieces.
    """

    #: What `engines.open_engine` and records call it.
    name: ClassVar[str]
    #: Version of the library that runs the graphs.
    onnxruntime_version: str
    #: [B] int64, the token that the next step reads; items can be read and set.
    next_token: memoryview
    #: Positions that the buffers hold.
    capacity: int = 0
    #: [B + 1] index of each row's last token, and behind them the length of the longest row; the graphs read both.
    _lengths: Any
    #: [B] position of each row's last token, for graphs that take positions.
    _positions: Any

    def __init__(self, bundle: Bundle, *, threads: int = 1, batch_size: int = 1, max_len: int | None = None):
        """Check sizes and hashes; a row never holds more than `max_len` tokens (default: the context's).

        Raises `BundleError` when files differ from the manifest, `ConfigError` for a size that makes no sense.
        """
        context = bundle.model.context_length
        max_len = context if max_len is None else max_len
        for name, value in (("threads", threads), ("batch_size", batch_size), ("max_len", max_len)):
            if value < 1:
                raise ConfigError(f"{name}: got {value}, expected a whole number above 0")
        if max_len > context:
            raise ConfigError(f"max_len: got {max_len}, expected at most the context of {context} tokens")
        bundle.check_graph_files("prefill", "decode")
        self._num_prompts = 0
        # Rows that are computed alone are bound one by one.
        self._kept_calls = max(KEPT_CALLS, batch_size)
        self.bundle = bundle
        self.threads = threads
        self.batch_size = batch_size
        self.max_len = max_len

    @property
    @abstractmethod
    def logits(self) -> np.ndarray:
        """[B, V] logits after each row's last token."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the key and value buffers as they are now."""

    @property
    def position(self) -> int:
        """Tokens held for the longest row."""
        return int(self._lengths[self.batch_size])

    @property
    def lengths(self) -> list[int]:
        """Tokens held for each row."""
        return [int(self._lengths[row]) + 1 for row in range(self.batch_size)]

    def row_length(self, row: int) -> int:
        """Tokens held for one row."""
        return int(self._lengths[row]) + 1

    def prefill(self, ids_BS: Sequence[Ids] | np.ndarray) -> None:
        """Start over with one prompt per row, each of at least one token.

        Prompts of one length go through the graph together, prompts of several lengths one after the other, and so do
        long ones and those of a graph that the bundle marks. Before an engine's second prompt, where its weights are
        large, the process's memory is moved to huge pages, once, in about half a second at most.
        Raises `ContextError` for a prompt longer than `max_len`, `BundleError` for an id outside the vocabulary.
        """
        assert len(ids_BS) == self.batch_size, f"{len(ids_BS)} prompts for {self.batch_size} rows"
        rows = [self._checked(ids) for ids in ids_BS]
        lengths = [len(ids) for ids in rows]
        self._start_over(max(lengths))
        together = len(rows) == 1 or (min(lengths) == max(lengths) and not self.bundle.prompt_by_row)
        if together and self._fits_one_call(lengths[0]):
            self._set_lengths(lengths)
            self._run_graph("prefill", rows, None)
        else:
            for row, ids in enumerate(rows):
                self._feed(ids, row, 0)
            self._set_lengths(lengths)

    def prefill_shared(self, ids_S: Ids) -> None:
        """Start over with the same prompt in every row; it is computed once and its keys and values are copied."""
        ids = self._checked(ids_S)
        self._start_over(len(ids))
        self._feed(ids, 0, 0)
        self._set_lengths([len(ids)] * self.batch_size)
        self._copy_rows([0] * self.batch_size, len(ids))

    def extend(self, ids: Ids, row: int = 0) -> None:
        """Append tokens to what a row holds; `next_token` and `logits` of the row are then those after the last.

        A token that `next_token` holds and no `step` has fed is not among what the row holds.
        Other rows stay as they are. Where the bundle's prefill graph takes no past (`Bundle.prefill_takes_past`), the
        tokens go through the decode graph one by one. Raises like `prefill`.
        """
        lengths = self.lengths
        ids = self._checked(ids, held=lengths[row])
        self._count_prompt()
        self.reserve(lengths[row] + len(ids))
        self._feed(ids, row, lengths[row])
        lengths[row] += len(ids)
        self._set_lengths(lengths)

    def truncate(self, length: int, row: int = 0) -> None:
        """Keep only the first `length` tokens of a row.

        `next_token` and `logits` of the row are stale then: `extend` it next, or write the token to `step` with.
        """
        lengths = self.lengths
        assert 0 <= length <= lengths[row], f"row {row} holds {lengths[row]} tokens, asked to keep {length}"
        lengths[row] = length
        self._set_lengths(lengths)

    @abstractmethod
    def step(self) -> None:
        """Feed `next_token` and compute the token after it. Raises `ContextError` at `max_len` tokens."""

    def reorder_cache(self, source_rows: Sequence[int]) -> None:
        """Make row i a copy of what row `source_rows[i]` was: its keys, values, length, token and logits."""
        assert len(source_rows) == self.batch_size
        lengths = [self.lengths[row] for row in source_rows]
        self._copy_rows(source_rows, max(lengths))
        self._set_lengths(lengths)

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens per row, at most `max_len`, before they come."""
        assert length <= self.max_len
        if length <= self.capacity:
            return
        capacity = self.capacity or FIRST_CAPACITY
        while capacity < length:
            capacity *= 2
        self._allocate(min(capacity, self.max_len), self.position)

    @abstractmethod
    def _allocate(self, capacity: int, used: int) -> None:
        """Buffers of `capacity` positions, with what the first `used` of those before held."""

    @abstractmethod
    def _run_graph(self, role: Role, rows: Sequence[Sequence[int]], row: int | None) -> None:
        """Run a graph on new tokens, equally many for all rows, or for one row; lengths count them already."""

    @abstractmethod
    def _copy_rows(self, source_rows: Sequence[int], length: int) -> None:
        """Copy keys and values of `length` positions, tokens and logits, from where they are before the call."""

    def _start_over(self, length: int) -> None:
        """Forget all tokens, for prompts of at most `length`."""
        self._count_prompt()
        self._set_lengths([0] * self.batch_size)
        self.reserve(length)

    def _feed(self, ids: Sequence[int], row: int, start: int) -> None:
        """Run tokens that follow the first `start` of a row, piece by piece; other rows' lengths are lost."""
        one_by_one = start > 0 and not self.bundle.prefill_takes_past
        size = 1 if one_by_one else len(ids) if self._fits_one_call(len(ids)) else PIECE_TOKENS
        for first in range(0, len(ids), size):
            piece = ids[first : first + size]
            self._set_lengths([start + first + len(piece)] * self.batch_size)
            self._run_graph("decode" if one_by_one else "prefill", [piece], row)

    def _fits_one_call(self, num_tokens: int) -> bool:
        return num_tokens <= PIECE_TOKENS or not self.bundle.prefill_takes_past

    def _make_room(self) -> None:
        """Grow for one more token. Raises `ContextError` where no row may hold more."""
        if self.capacity >= self.max_len:
            raise ContextError(f"the context of {self.max_len} tokens is full", hint=self._context_hint())
        self.reserve(self.capacity + 1)

    def _count_prompt(self) -> None:
        # The second prompt shows that the process stays, so that what this costs once will pay.
        self._num_prompts += 1
        if self._num_prompts == 2 and self.bundle.weight_bytes >= MIN_WEIGHT_BYTES:
            move_to_huge_pages()

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        for row, length in enumerate(lengths):
            self._lengths[row] = self._positions[row] = length - 1
        self._lengths[self.batch_size] = max(lengths)

    def _checked(self, ids: Ids, held: int = 0) -> list[int]:
        """The ids as a list; raises when they do not fit behind `held` tokens, or the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        assert ids, "a prompt has at least one token"
        if held + len(ids) > self.max_len:
            behind = f" behind {held}" if held else ""
            raise ContextError(
                f"the prompt has {len(ids)} tokens{behind}, the context holds {self.max_len}", hint=self._context_hint()
            )
        last = self.bundle.model.vocab_size - 1
        if min(ids) < 0 or max(ids) > last:
            raise BundleError(f"prompt: a token id is outside the vocabulary, 0 to {last}")
        return ids

    def _context_hint(self) -> str:
        context = self.bundle.model.context_length
        if self.max_len < context:
            return f"the model's context has {context} tokens; load it with a larger max_len"
        return "shorten the prompt, or ask for fewer tokens"
