"""A teacher's probabilities for the positions of training sequences, computed once and kept on disk.

    # B batch, T tokens, S tokens kept of each position

A record of the cache is the key of a sequence (a hash of its ids and documents) and what the teacher said of it, of one
size for all. Each process appends to a file of its own and reads those of all; a record that a killed process left
half written is not counted.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ryot.train.batch import Batch

#: Logits [T, V] of one sequence from its start on, float32.
Score = Callable[[NDArray[np.int64]], NDArray[np.float32]]

_KEY_BYTES = 16


class Teacher:
    """What a teacher says of sequences of one length."""

    def __init__(self, build_score: Callable[[], Score], *, cache: Path, length: int, top_k: int):
        """`build_score` is called when something is not in the cache; `cache` is a folder for this teacher alone."""
        self._build_score = build_score
        self._score: Score | None = None
        self._top_k, self._length = top_k, length
        self._record = np.dtype(
            [("key", f"V{_KEY_BYTES}"), ("ids", "<u4", (length, top_k)), ("probabilities", "<f2", (length, top_k))]
        )
        self._folder = cache / f"{length}-{top_k}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[bytes, tuple[Path, int]] = {}
        self._read: dict[Path, int] = {}
        self._own = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.bin"

    def teach(self, batch: Batch) -> Batch:
        """The batch with what the teacher says of each position."""
        shape = (*batch.inputs_BT.shape, self._top_k)
        ids, probabilities = np.empty(shape, np.int64), np.empty(shape, np.float32)
        documents = batch.documents_BT
        rows = [
            (inputs.numpy(), None if documents is None else documents[b].numpy())
            for b, inputs in enumerate(batch.inputs_BT)
        ]
        keys = [_key(*row) for row in rows]
        if any(key not in self._known for key in keys):
            self._look()
        for b, (key, row) in enumerate(zip(keys, rows)):
            if key not in self._known:
                self._append(key, *self._compute(*row))
            path, index = self._known[key]
            [record] = np.fromfile(path, self._record, 1, offset=index * self._record.itemsize)
            ids[b], probabilities[b] = record["ids"], record["probabilities"]
        return Batch(
            batch.inputs_BT, batch.targets_BT, documents, torch.from_numpy(ids), torch.from_numpy(probabilities)
        )

    def _look(self) -> None:
        """Take in what other processes have written since."""
        for path in sorted(self._folder.glob("*.bin")):
            count = path.stat().st_size // self._record.itemsize
            begin = self._read.get(path, 0)
            if count > begin:
                records = np.memmap(path, self._record, mode="r", shape=(count,))
                for i in range(begin, count):
                    self._known.setdefault(records["key"][i].tobytes(), (path, i))
                self._read[path] = count

    def _compute(
        self, ids_T: NDArray[np.int64], documents_T: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The most probable tokens of each position; each document is read from its own start on."""
        self._score = self._score or self._build_score()
        kept = np.zeros((len(ids_T), self._top_k), np.int64)
        probabilities = np.zeros((len(ids_T), self._top_k), np.float32)
        cuts = [0, len(ids_T)]
        if documents_T is not None:
            cuts[1:1] = (np.flatnonzero(np.diff(documents_T)) + 1).tolist()
        for start, stop in itertools.pairwise(cuts):
            if documents_T is not None and documents_T[start] < 0:
                continue  # after the last document
            logits = torch.from_numpy(self._score(ids_T[start:stop]))
            values, found = logits.topk(self._top_k, dim=-1)
            kept[start:stop], probabilities[start:stop] = found.numpy(), values.softmax(dim=-1).numpy()
        return kept, probabilities

    def _append(self, key: bytes, ids: NDArray[np.int64], probabilities: NDArray[np.float32]) -> None:
        record = np.zeros(1, self._record)
        record["key"], record["ids"], record["probabilities"] = np.void(key), ids, probabilities
        with self._own.open("ab") as file:
            file.write(record.tobytes())
        index = self._read.get(self._own, 0)
        self._known[key] = (self._own, index)
        self._read[self._own] = index + 1


def _key(ids_T: NDArray[np.int64], documents_T: NDArray[np.int64] | None) -> bytes:
    digest = hashlib.sha256(ids_T.astype("<i8").tobytes())
    if documents_T is not None:
        digest.update(documents_T.astype("<i8").tobytes())
    return digest.digest()[:_KEY_BYTES]
