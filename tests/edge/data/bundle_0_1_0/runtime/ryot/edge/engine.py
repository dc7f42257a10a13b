"""What every engine does for a caller, apart from how it reaches onnxruntime.

`session` goes through onnxruntime's Python binding and numpy, `capi` through its C library without either;
`engines` chooses between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ryot.edge.bundle import Bundle
from ryot.edge.hugepages import MIN_WEIGHT_BYTES, move_to_huge_pages
from ryot.errors import BundleError, ConfigError, ContextError

if TYPE_CHECKING:
    import numpy as np

Ids = Sequence[int] | Any
"""Token ids of one sequence: any sequence of integers, a numpy array included."""


class EngineUnavailable(BundleError):
    """This engine cannot run here; another one may."""


class Engine(ABC):
    """One bundle, loaded and ready: `prefill` a prompt for every row, then `step` a token at a time.

    After either call `next_token` [B] holds the greedy choice and `logits` [B, V] what it was chosen from. Both are
    views of the runtime's own buffers. Writing into `next_token` before `step` replaces the greedy choice.

    A dynamic-int8 graph takes one scale for all rows of a call, so there a row's logits depend, within the
    quantization's error, on its neighbours. Other precisions compute each row by itself.
    """

    #: Version of the library that runs the graphs.
    onnxruntime_version: str
    #: [B] the token that the next step reads; items can be read and set.
    next_token: Any
    #: [B + 1] index of each row's last token, and behind them the length of the longest row; the graphs read both.
    _lengths: Any
    #: [B] position of each row's last token, for graphs that take positions.
    _positions: Any

    def __init__(self, bundle: Bundle, *, threads: int = 1, batch_size: int = 1, max_len: int | None = None):
        """Check sizes and hashes; buffers hold `batch_size` rows of `max_len` tokens (default: the context's).

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
        self.bundle = bundle
        self.threads = threads
        self.batch_size = batch_size
        self.max_len = max_len

    @property
    @abstractmethod
    def logits(self) -> np.ndarray:
        """[B, V] logits after each row's last token."""

    @property
    def position(self) -> int:
        """Tokens held for the longest row."""
        return int(self._lengths[self.batch_size])

    def prefill(self, ids_BS: Sequence[Ids] | np.ndarray) -> None:
        """Start over with one prompt a row, each of at least one token.

        Prompts of one length go through the graph together, prompts of several lengths one after the other. Before the
        second prompt large weights are moved to huge pages, once, for a fraction of a second.
        Raises `ContextError` for a prompt longer than `max_len`, `BundleError` for an id outside the vocabulary.
        """
        assert len(ids_BS) == self.batch_size, f"{len(ids_BS)} prompts for {self.batch_size} rows"
        rows = [self._checked(ids) for ids in ids_BS]
        lengths = [len(ids) for ids in rows]
        self._count_prompt()
        if min(lengths) == max(lengths):
            self._set_lengths(lengths)
            self._run_prompt(rows, None)
        else:
            for row, ids in enumerate(rows):
                self._set_lengths([len(ids)] * self.batch_size)
                self._run_prompt([ids], row)
            self._set_lengths(lengths)

    def prefill_shared(self, ids_S: Ids) -> None:
        """Start over with the same prompt in every row; it is computed once and its keys and values are copied."""
        ids = self._checked(ids_S)
        self._count_prompt()
        self._set_lengths([len(ids)] * self.batch_size)
        self._run_prompt([ids], 0)
        self._copy_rows([0] * self.batch_size, len(ids))

    @abstractmethod
    def step(self) -> None:
        """Feed `next_token` and compute the token after it. Raises `ContextError` at the end of the buffers."""

    def keep_rows(self, source_rows: Sequence[int]) -> None:
        """Make row i a copy of what row `source_rows[i]` was: its keys, values, length, token and logits."""
        assert len(source_rows) == self.batch_size
        lengths = [int(self._lengths[row]) + 1 for row in source_rows]
        self._copy_rows(source_rows, max(lengths))
        self._set_lengths(lengths)

    @abstractmethod
    def _run_prompt(self, rows: list[list[int]], row: int | None) -> None:
        """Run the prompt graph on prompts of one length, for all rows, or for one."""

    @abstractmethod
    def _copy_rows(self, source_rows: Sequence[int], length: int) -> None:
        """Copy keys and values of `length` positions, tokens and logits, from where they are before the call."""

    def _count_prompt(self) -> None:
        # The second prompt shows that the process stays, so that what this costs once will pay.
        self._num_prompts += 1
        if self._num_prompts == 2 and self.bundle.weight_bytes >= MIN_WEIGHT_BYTES:
            move_to_huge_pages()

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        for row, length in enumerate(lengths):
            self._lengths[row] = self._positions[row] = length - 1
        self._lengths[self.batch_size] = max(lengths)

    def _checked(self, ids: Ids) -> list[int]:
        """The ids as a list; raises when they do not fit the buffers or the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        assert ids, "a prompt has at least one token"
        if len(ids) > self.max_len:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, the context holds {self.max_len}", hint=self._context_hint()
            )
        last = self.bundle.model.vocab_size - 1
        if min(ids) < 0 or max(ids) > last:
            raise BundleError(f"prompt: a token id is outside the vocabulary, 0 to {last}")
        return ids

    def _raise_full(self) -> None:
        raise ContextError(f"the context of {self.max_len} tokens is full", hint=self._context_hint())

    def _context_hint(self) -> str:
        context = self.bundle.model.context_length
        if self.max_len < context:
            return f"the model's context has {context} tokens; load it with a larger max_len"
        return "shorten the prompt, or ask for fewer tokens"
