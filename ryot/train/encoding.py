"""Text to token ids in bounded memory: long texts in pieces, cut only where the tokenizer does not notice."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

#: A text longer than twice this is cut into pieces of about this many characters.
PIECE_CHARS = 1 << 16
#: What is encoded at once; an encoding takes some 40 bytes per byte of text until its ids are taken out of it.
_BATCH_CHARS = 1 << 20
#: What stands on each side of a cut while it is tried, and how many places are tried for one cut.
_CONTEXT_CHARS = 256
_MAX_TRIES = 8
_BEFORE_SPACE = re.compile(r"\S(?=\s)")

#: How often progress is told.
TELL_EVERY_S = 5.0

T = TypeVar("T")
#: What a piece of text becomes: its ids, or the words that ids are learned from.
Split = Callable[[str], Sequence[object]]


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str], separator_id: int | None) -> Iterator[NDArray[np.int64]]:
    """The ids of all texts, `separator_id` in front of each if there is one, in batches: int64 [n]."""
    batch: list[str] = []
    begins: list[bool] = []
    size = 0

    def encode() -> NDArray[np.int64]:
        ids: list[int] = []
        for first, encoding in zip(begins, tokenizer.encode_batch_fast(batch, add_special_tokens=False)):
            ids += [separator_id, *encoding.ids] if first and separator_id is not None else encoding.ids
        return np.asarray(ids, dtype=np.int64)

    for text in texts:
        for i, piece in enumerate(cut_pieces(text, lambda t: tokenizer.encode(t, add_special_tokens=False).ids)):
            batch.append(piece)
            begins.append(i == 0)
            size += len(piece)
            if size >= _BATCH_CHARS:
                yield encode()
                batch, begins, size = [], [], 0
    if batch:
        yield encode()


def cut_pieces(text: str, split: Split) -> Iterator[str]:
    """The text in pieces that `split` makes the same of as of the whole; a text that allows no such cut stays whole.

    Between a word and the white space behind it most tokenizers split anyway, so what follows does not depend on what
    went before; that it is so here is tried around each cut.
    """
    begin = 0
    while len(text) - begin > 2 * PIECE_CHARS and (end := _find_cut(text, begin + PIECE_CHARS, split)):
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text


def _find_cut(text: str, after: int, split: Split) -> int | None:
    for _ in range(_MAX_TRIES):
        if (found := _BEFORE_SPACE.search(text, after)) is None:
            return None
        cut = after = found.end()
        left, right = text[max(0, cut - _CONTEXT_CHARS) : cut], text[cut : cut + _CONTEXT_CHARS]
        if [*split(left), *split(right)] == list(split(left + right)):
            return cut
    return None


def tell_progress(
    items: Sequence[T], num_chars: Callable[[T], int], what: str, tell: Callable[[str], None]
) -> Iterator[T]:
    """The items, one by one; `tell` is told every few seconds how much of them has been taken, and the time left."""
    total = sum(map(num_chars, items)) or 1
    begin = told_at = time.monotonic()
    taken = 0
    for item in items:
        yield item
        taken += num_chars(item)
        now = time.monotonic()
        if now - told_at >= TELL_EVERY_S:
            told_at = now
            left_s = (now - begin) * (total - taken) / taken
            tell(f"{what}, {taken / 1e6:.0f} of {total / 1e6:.0f} M characters, {left_s:.0f} s left")
