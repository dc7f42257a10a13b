"""Token shards: a corpus encoded once, kept as memory-mapped arrays under its content hash."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ryot.atomic import atomic_folder
from ryot.config import digest
from ryot.errors import DataError
from ryot.models.token_ids import TokenIds
from ryot.train.corpus import SPLITS, Corpus, Document
from ryot.train.encoding import encode_stream, tell_progress
from ryot.train.records import RecordEncoder, plain_texts
from ryot.train.source_text import OWN_IDS, SourceText, load_foreign_tokenizer
from ryot.train.tokenizer import END_OF_TEXT_ID, TOKENIZER_RECIPE, byte_lengths, train_tokenizer

log = logging.getLogger(__name__)

_SCHEMA = 2
#: Of how records are encoded.
_RECORDS_SCHEMA = 2


@dataclass(frozen=True)
class Dataset:
    """An encoded corpus: `tokenizer.json`, `meta.json` and one `SPLIT.bin` of token ids for each split.

    Texts are joined with the end-of-text token in front of each.
    """

    path: Path
    name: str
    corpus_sha256: str
    vocab_size: int
    num_tokens: dict[str, int]
    """Tokens of each split."""
    token_ids: TokenIds = OWN_IDS
    text_files: tuple[str, ...] = ()
    """The files of the checkpoint that the tokenizer is taken from; empty for one that was learned here."""
    has_records: bool = False
    """Whether documents are kept apart, with what is learned of each: `SPLIT.learned` and `SPLIT.starts`."""
    unusual: dict[str, int] = field(default_factory=dict)
    """What was met while records were encoded, with counts."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with."""
        if self.text_files:
            return load_foreign_tokenizer(self.path)
        return Tokenizer.from_file(str(self.path / "tokenizer.json"))

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each token stands for, int64 [V]."""
        return byte_lengths(self.tokenizer, self.token_ids.separator if self.text_files else None)

    def learned(self, split: str) -> np.ndarray:
        """Of records: whether each token of a split is learned, memory-mapped."""
        return np.memmap(self.path / f"{split}.learned", dtype=np.bool_, mode="r")

    def starts(self, split: str) -> np.ndarray:
        """Of records: where each document of a split begins, and at last its end, int64."""
        return np.fromfile(self.path / f"{split}.starts", dtype="<i8")

    def tokens(self, split: str) -> np.ndarray:
        """The memory-mapped ids of a split, one after the other."""
        return np.memmap(self.path / f"{split}.bin", dtype=_token_dtype(self.vocab_size), mode="r")

    def windows(self, split: str, count: int, length: int) -> np.ndarray:
        """Evenly spread stretches of a split, int64 [n, length + 1], n at most `count`: inputs and shifted targets."""
        return spread_windows(self.tokens(split), count, length, f"the {split} split")

    def check_sequences(self, length: int, batch_size: int) -> None:
        """Raise `DataError` when a split has no sequence of `length`, or training less than one batch of them."""
        for split in ("val", "test"):
            self.windows(split, 1, length)
        if (have := (self.num_tokens["train"] - 1) // length) < batch_size:
            raise DataError(
                f"data: the training split has {have} sequences of {length} tokens, "
                f"expected at least a batch of {batch_size}",
                hint="give more text with --data",
            )


class HeldOutText:
    """A corpus under any tokenizer, encoded split by split when it is asked for; for scoring, not for training."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        separator_id: int | None = END_OF_TEXT_ID,
        records: RecordEncoder | None = None,
    ):
        """`separator_id` stands in front of each text; None for nothing. `records` encodes a corpus that has some."""
        assert (records is not None) == corpus.has_records
        self._records = records
        self.corpus_sha256 = corpus.sha256
        self.byte_lengths = byte_lengths(tokenizer, separator_id)
        self._corpus, self._tokenizer, self._separator_id = corpus, tokenizer, separator_id
        self._tokens: dict[str, np.ndarray] = {}

    def check_sequences(self, length: int) -> None:
        """Raise `DataError` when a split has no sequence of `length`; takes far less than encoding all of the text."""
        for split in SPLITS:
            head = np.empty(0, np.int64)
            for ids in self._encode(split):
                head = np.concatenate([head, ids])
                if len(head) > length:
                    break
            spread_windows(head, 1, length, f"the {split} split")

    def windows(self, split: str, count: int, length: int) -> np.ndarray:
        """Evenly spread stretches of a split, int64 [n, length + 1], n at most `count`: inputs and shifted targets."""
        if split not in self._tokens:
            dtype = _token_dtype(self._tokenizer.get_vocab_size())
            parts = (ids.astype(dtype) for ids in self._encode(split))
            self._tokens[split] = np.concatenate([np.empty(0, dtype), *parts])
        return spread_windows(self._tokens[split], count, length, f"the {split} split")

    def _encode(self, split: str) -> Iterator[np.ndarray]:
        if self._records is None:
            texts = (document.text for document in self._corpus.split(split))
            return encode_stream(self._tokenizer, texts, self._separator_id)
        encode = self._records.encode
        return (encode(d.content, f"data: {d.name}")[0] for d in self._corpus.split(split))


class Batches:
    """Training batches by step number: batch i is the same whenever and wherever it is asked for.

    The split is cut into sequences; each epoch visits all of them once in an order drawn from seed and epoch.
    """

    def __init__(self, dataset: Dataset, *, length: int, batch_size: int, seed: int):
        dataset.check_sequences(length, batch_size)
        self._tokens = dataset.tokens("train")
        self._length, self._batch_size, self._seed = length, batch_size, seed
        self._num_sequences = (len(self._tokens) - 1) // length
        self._per_epoch = self._num_sequences // batch_size
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 [B, T] each."""
        epoch, index = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._seed, epoch, self._num_sequences)
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        window = torch.from_numpy(
            self._tokens[chosen[:, None] * self._length + np.arange(self._length + 1)].astype(np.int64)
        )
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch visits `count` sequences."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def spread_windows(tokens: np.ndarray, count: int, length: int, name: str) -> np.ndarray:
    """Evenly spread stretches of a row of ids, int64 [n, length + 1], n at most `count`.

    Raises `DataError`, which calls the text `name`, when not even one fits.
    """
    fit = (len(tokens) - 1) // length
    if fit < 1:
        raise DataError(
            f"data: {name} has {len(tokens)} tokens, expected more than one sequence of {length}",
            hint="give more text with --data",
        )
    starts = np.linspace(0, len(tokens) - length - 1, min(count, fit)).astype(np.int64)
    return np.asarray(tokens[starts[:, None] + np.arange(length + 1)], dtype=np.int64)


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def load_dataset(path: Path) -> Dataset:
    """An encoded corpus on disk. Raises `DataError` when a shard is missing or cut short."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(
            f"dataset {path}: meta.json cannot be read", hint="remove the folder; it is made again"
        ) from error
    dataset = Dataset(
        path=path,
        name=meta["name"],
        corpus_sha256=meta["corpus_sha256"],
        vocab_size=meta["vocab_size"],
        num_tokens=meta["num_tokens"],
        token_ids=TokenIds(ids["bos"], tuple(ids["eos"]), ids["pad"]) if (ids := meta.get("token_ids")) else OWN_IDS,
        text_files=tuple(meta.get("text_files", ())),
        has_records=meta.get("has_records", False),
        unusual=meta.get("unusual", {}),
    )
    for split, count in dataset.num_tokens.items():
        shard, expected = path / f"{split}.bin", count * _token_dtype(dataset.vocab_size).itemsize
        got = shard.stat().st_size if shard.exists() else 0
        if got != expected:
            raise DataError(
                f"dataset {path}: {shard.name} has {got} bytes, expected {expected}",
                hint="remove the folder; it is made again",
            )
    return dataset


def prepare_dataset(
    corpus: Corpus,
    vocab_size: int,
    cache_dir: Path,
    *,
    text: SourceText | None = None,
    on_progress: Callable[[str], None] = log.info,
) -> tuple[Dataset, bool]:
    """The encoded corpus, made now or found in the cache; the flag says which (True: found).

    Without the `text` of a model a tokenizer of `vocab_size` is learned; with one, `vocab_size` is the model's. The
    folder appears under its final name only when it is complete. `on_progress` is told every few seconds how far it is.
    """
    # Shards of a corpus without moved copies, and of texts under a tokenizer of our own, are those of earlier versions.
    more: list[object] = ["copies go where the first one goes"] if corpus.has_moved_copies else []
    if corpus.has_records:
        more.append(f"records {_RECORDS_SCHEMA}")
    if text is not None:
        more.append(text.sha256)
    key = digest(_SCHEMA, TOKENIZER_RECIPE, corpus.name, corpus.sha256, vocab_size, *more)[:16]
    path = cache_dir / "datasets" / key
    if path.exists():
        return load_dataset(path), True
    for split in SPLITS:
        if not corpus.split(split):
            size = sum(d.num_chars for d in corpus.documents)
            copies = f", {corpus.num_copies} of its {len(corpus.documents)} documents are copies"
            raise DataError(
                f"data: {corpus.name} has {size} characters{copies if corpus.num_copies else ''}, "
                f"too few for a {split} split",
                hint="give more text with --data",
            )
    if text is None:
        taken = tell_progress(corpus.split("train"), lambda d: d.num_chars, "learning a vocabulary", on_progress)
        tokenizer = train_tokenizer((words for d in taken for words in plain_texts(d.content)), vocab_size)
        text = SourceText(tokenizer=tokenizer, token_ids=OWN_IDS, template=None, files={}, where="a tokenizer of ours")
    dtype = _token_dtype(vocab_size)
    encoder = RecordEncoder(text)
    try:
        with atomic_folder(path) as partial:
            for name, data in text.files.items():
                (partial / name).write_bytes(data)
            if not text.files:
                text.tokenizer.save(str(partial / "tokenizer.json"))
            num_tokens = {}
            for split in SPLITS:
                documents = corpus.split(split)
                with (partial / f"{split}.bin").open("wb") as shard:
                    if corpus.has_records:
                        _write_records(partial, split, shard, documents, encoder, dtype)
                    else:
                        what = f"encoding the {split} split"
                        taken = tell_progress(documents, lambda d: d.num_chars, what, on_progress)
                        for ids in encode_stream(text.tokenizer, (d.text for d in taken), text.token_ids.separator):
                            ids.astype(dtype).tofile(shard)
                    num_tokens[split] = shard.tell() // dtype.itemsize
            meta = {
                "schema": _SCHEMA,
                "name": corpus.name,
                "corpus_sha256": corpus.sha256,
                "vocab_size": vocab_size,
                "num_tokens": num_tokens,
                "token_ids": text.token_ids._asdict(),
                "text_files": sorted(text.files),
                "has_records": corpus.has_records,
                "unusual": encoder.unusual,
            }
            (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    except OSError as error:
        # Another run may have finished the same folder first: its content is the same.
        if not path.exists():
            raise DataError(
                f"data: shards cannot be written to the cache {path.parent} ({error.strerror or error})",
                hint="make room there, or set RYOT_CACHE_DIR to another folder",
            ) from error
    return load_dataset(path), False


def _write_records(
    folder: Path, split: str, shard: BinaryIO, documents: Sequence[Document], encoder: RecordEncoder, dtype: np.dtype
) -> None:
    """Write the shard of a split, what is learned of it, and where its documents begin."""
    starts = np.zeros(len(documents) + 1, "<i8")
    with (folder / f"{split}.learned").open("wb") as file:
        for i, document in enumerate(documents):
            ids, learned = encoder.encode(document.content, f"data: {document.name}")
            ids.astype(dtype).tofile(shard)
            learned.tofile(file)
            starts[i + 1] = starts[i] + len(ids)
    starts.tofile(folder / f"{split}.starts")
