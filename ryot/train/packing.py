"""Documents packed into sequences of one length, none of which attends to another or is learned from its end on.

    # R sequences, T tokens of one

A document of n tokens takes n - 1 positions: each but the last is an input, each but the first a target. Longest first,
each document goes where it leaves the least room (best fit); which documents share a sequence does not depend on seed
or epoch, the order of sequences does.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ryot.errors import DataError
from ryot.train.dataset import Dataset, epoch_order

#: The target of a position that nothing is learned from (torch's `ignore_index`).
IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReport:
    """What became of a split's documents at one length."""

    documents: int
    truncated: int
    """Records that lost their end; what was left of the answer is learned."""
    refused: int
    """Records left out: of their answer nothing fits."""
    sequences: int
    filled: float
    """Share of the positions that hold a document."""
    lengths: tuple[int, int, int, int]
    """Tokens of a document: the shortest, the median, the 95th of 100, the longest."""

    def check_batch(self, batch_size: int, length: int) -> None:
        """Raise `DataError` when these sequences are less than one batch."""
        if self.sequences < batch_size:
            raise DataError(
                f"data: the training split fills {self.sequences} sequences of {length} tokens, expected at least a "
                f"batch of {batch_size}",
                hint="give more records, or a smaller train.batch_size or train.sequence_length",
            )

    @property
    def text(self) -> str:
        """The report in a line."""
        low, middle, high, top = self.lengths
        return (
            f"{self.documents} documents of {low} to {top} tokens (median {middle}, 95 % up to {high}) in "
            f"{self.sequences} sequences, {100 * self.filled:.0f} % filled; {self.truncated} truncated, "
            f"{self.refused} too long to learn from and left out"
        )


class PackedSequences:
    """The sequences of one split, made when they are asked for."""

    def __init__(self, dataset: Dataset, split: str, length: int):
        """Raises `DataError` when no document is left."""
        self._length = length
        self._tokens, self._learned = dataset.tokens(split), dataset.learned(split)
        pieces, self.report = _cut(dataset.starts(split), self._learned, length)
        self._rows = _best_fit(pieces, length)
        self.report = _with_rows(self.report, self._rows, pieces, length)
        if not self._rows:
            raise DataError(
                f"data: the {split} split has no record of which anything is learned in sequences of {length} tokens",
                hint="give more records, or a larger train.sequence_length",
            )

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets (`IGNORED` where nothing is learned) and the document of each position, int64 [B, T]."""
        shape = (len(rows), self._length)
        inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        documents = np.full(shape, -1, np.int64)
        for b, row in enumerate(rows):
            at = 0
            for number, (start, end) in enumerate(self._rows[row]):
                here = slice(at, at + end - start - 1)
                inputs[b, here] = self._tokens[start : end - 1]
                following = self._tokens[start + 1 : end].astype(np.int64)
                targets[b, here] = np.where(self._learned[start + 1 : end], following, IGNORED)
                documents[b, here] = number
                at = here.stop
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(documents)

    def spread(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """At most `count` evenly spread sequences, as `take` gives them."""
        return self.take(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))


class PackedBatches:
    """Training batches by step number, like `ryot.train.dataset.Batches`, of packed documents."""

    def __init__(self, dataset: Dataset, *, length: int, batch_size: int, seed: int):
        self._sequences = PackedSequences(dataset, "train", length)
        self._sequences.report.check_batch(batch_size, length)
        self._batch_size, self._seed = batch_size, seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and documents of a step, int64 [B, T] each."""
        epoch, index = divmod(step, len(self._sequences) // self._batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._seed, epoch, len(self._sequences))
        return self._sequences.take(self._order[index * self._batch_size : (index + 1) * self._batch_size])


def _cut(
    starts: NDArray[np.int64], learned: NDArray[np.bool_], length: int
) -> tuple[list[tuple[int, int]], PackReport]:
    """The stretch of tokens that each document gives, several of a text that is longer than a sequence."""
    pieces: list[tuple[int, int]] = []
    truncated = refused = 0
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        if end - start - 1 <= length:
            if learned[start + 1 : end].any():
                pieces.append((start, end))
        elif learned[start + 1 : end].all():
            pieces += [(at, min(at + length + 1, end)) for at in range(start, end - 1, length)]
        elif learned[start + 1 : start + 1 + length].any():
            pieces.append((start, start + 1 + length))
            truncated += 1
        else:
            refused += 1
    sizes = np.diff(starts)
    quantiles = np.quantile(sizes, (0, 0.5, 0.95, 1), method="lower") if len(sizes) else np.zeros(4)
    low, middle, high, top = (int(q) for q in quantiles)
    report = PackReport(
        documents=len(sizes),
        truncated=truncated,
        refused=refused,
        sequences=0,
        filled=0.0,
        lengths=(low, middle, high, top),
    )
    return pieces, report


def _best_fit(pieces: list[tuple[int, int]], length: int) -> list[list[tuple[int, int]]]:
    """Rows of pieces; the longest go first, each where it leaves the least room."""
    rows: list[list[tuple[int, int]]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for start, end in sorted(pieces, key=lambda p: (p[0] - p[1], p[0])):
        size = end - start - 1
        found = bisect.bisect_left(rooms, size)
        if found < len(rooms):
            room = rooms[found]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[found]
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append((start, end))
        if left := room - size:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return rows


def _with_rows(
    report: PackReport, rows: list[list[tuple[int, int]]], pieces: list[tuple[int, int]], length: int
) -> PackReport:
    used = sum(end - start - 1 for start, end in pieces)
    return PackReport(
        documents=report.documents,
        truncated=report.truncated,
        refused=report.refused,
        sequences=len(rows),
        filled=used / (len(rows) * length) if rows else 0.0,
        lengths=report.lengths,
    )
