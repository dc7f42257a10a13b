"""Text that a run learns from: found, read, hashed and split into training, validation and test."""

from __future__ import annotations

import hashlib
import itertools
import logging
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ryot.errors import DataError
from ryot.train.records import Record, has_answer, parse_record_text, question_text, record_text
from ryot.train.text_files import find_files, holds_rows, read_rows, read_text, show_path
from ryot.train.text_store import StoredText, TextStore, text_key

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")

#: Of 100 documents, those whose hash falls below the first bound are training, below the second validation.
_BOUNDS = (92, 96)

#: A user's corpus of fewer documents is cut into blocks, or a split by documents would be lopsided or empty.
_FEW_DOCUMENTS = 50
_BLOCK_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name it is sorted and split by; the name is the same on every machine."""

    name: str
    kept: str | Record | StoredText
    """What is learned from, or where it is."""

    @property
    def content(self) -> str | Record:
        """What is learned from: a text, or a row of prompt and completion, or of messages."""
        if not isinstance(self.kept, StoredText):
            return self.kept
        return parse_record_text(self.kept.read()) if self.kept.is_record else self.kept.read()

    @property
    def is_record(self) -> bool:
        """Whether it is a row, not a text."""
        return self.kept.is_record if isinstance(self.kept, StoredText) else not isinstance(self.kept, str)

    @property
    def text(self) -> str:
        """Of a record all of it, as JSON: what it is hashed and compared by. Not kept: it is as large as the record."""
        if isinstance(self.kept, StoredText):
            return self.kept.read()
        return self.kept if isinstance(self.kept, str) else record_text(self.kept)

    @property
    def num_chars(self) -> int:
        """Characters of its text."""
        return self.kept.num_chars if isinstance(self.kept, StoredText) else len(self.text)

    @property
    def key(self) -> bytes:
        """What copies have in common."""
        return self.kept.key if isinstance(self.kept, StoredText) else text_key(self.text.encode())

    @property
    def own_split(self) -> str:
        """`train`, `val` or `test`, by a hash of a text's name, or of what a record asks: a question is in one split.

        Of the usual hashes, BLAKE2s splits the default corpus nearest to 92/4/4 in bytes: 92.2/4.0/3.8.
        """
        content = self.content if self.is_record else ""
        key = self.name if isinstance(content, str) else question_text(content)
        bucket = int.from_bytes(hashlib.blake2s(key.encode()).digest()[:4]) % 100
        return SPLITS[sum(bucket >= bound for bound in _BOUNDS)]


@dataclass(frozen=True)
class Corpus:
    """Documents sorted by name, and the hash that loss figures hold for."""

    name: str
    documents: tuple[Document, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of all names and texts."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name, document.text):
                data = part.encode()
                digest.update(len(data).to_bytes(8) + data)
        return digest.hexdigest()

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The split of each document: its own, or of a copy where the first document with its text is.

        A text that is in training under one name and in validation or test under another would be scored from memory.
        """
        first: dict[bytes, str] = {}
        return tuple(first.setdefault(d.key, d.own_split) for d in self.documents)

    @cached_property
    def num_copies(self) -> int:
        """Documents whose text an earlier one has."""
        return len(self.documents) - len({d.key for d in self.documents})

    @property
    def has_moved_copies(self) -> bool:
        """Whether a copy is in another split than its own."""
        return any(split != d.own_split for split, d in zip(self.splits, self.documents))

    @property
    def has_records(self) -> bool:
        """Whether any document is a record."""
        return any(d.is_record for d in self.documents)

    def split(self, name: str) -> list[Document]:
        """The documents of one split, in order."""
        return [d for d, of in zip(self.documents, self.splits) if of == name]

    def texts(self, split: str) -> list[str]:
        """The texts of one split, in order."""
        return [d.text for d, of in zip(self.documents, self.splits) if of == split]


def load_corpus(paths: Sequence[str] = ()) -> Corpus:
    """The user's files, folders and globs, or the standard library's source when there are none.

    A `.jsonl` file holds one document per line, a `.parquet` file one per row: a `text`, a `prompt` with its
    `completion`, or the `messages` of a chat; `.gz` and `.zst` files are unpacked. Hidden files are passed over. Raises
    `ConfigError` for a path that does not exist, `DataError` for text that cannot be used.
    """
    if not paths:
        return _standard_library()
    documents: list[Document] = []
    empty: list[str] = []
    store = TextStore()
    for path in paths:
        for found, file in find_files(path):
            if not holds_rows(found):
                if kept := store.add(read_text(file)):
                    documents.append(Document(found, kept))
                continue
            for name, content in read_rows(found, file):
                if isinstance(content, str):
                    kept = store.add([content])
                elif has_answer(content):
                    kept = store.add([record_text(content)], is_record=True)
                else:
                    kept = None
                    empty.append(name)
                if kept:
                    documents.append(Document(name, kept))
    if empty:
        log.warning("data: %d records have no answer and are left out, the first is %s", len(empty), empty[0])
    if not documents:
        what = "no record with an answer" if empty else "no text"
        raise DataError(f"data: {', '.join(map(show_path, paths))} holds {what}")
    documents = list(_sorted(documents))
    if _has_few(documents):
        documents = [b for d in documents for b in ([d] if d.is_record else cut_document(d))]
    corpus = Corpus(name=", ".join(show_path(Path(p).name) for p in paths), documents=tuple(documents))
    if corpus.num_copies:
        log.warning(
            "data: %d of %d documents are copies of others; each goes into the split of the first one",
            corpus.num_copies,
            len(documents),
        )
    return corpus


def _sorted(documents: list[Document]) -> Iterator[Document]:
    """By name; those of one name, which come from several paths, by their texts."""
    documents.sort(key=lambda d: d.name)
    for _, group in itertools.groupby(documents, key=lambda d: d.name):
        same = list(group)
        yield from same if len(same) == 1 else sorted(same, key=lambda d: "" if d.is_record else d.text)


def _has_few(documents: Sequence[Document]) -> bool:
    keys: set[bytes] = set()
    for document in documents:
        keys.add(document.key)
        if len(keys) == _FEW_DOCUMENTS:
            return False
    return True


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (f for f in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(f.relative_to(root).parts))
    documents = []
    for file in sorted(files, key=lambda f: f.relative_to(root).as_posix()):
        text = file.read_text(encoding="utf-8", errors="strict")
        if text.strip():
            documents.append(Document(file.relative_to(root).as_posix(), text))
    if not documents:
        raise DataError(f"data: {root} holds no standard library sources", hint="give your own text with --data PATH")
    return Corpus(name="python-stdlib", documents=tuple(documents))


def cut_document(document: Document) -> Iterator[Document]:
    """The document in blocks of at most 4096 characters, cut after a line end where there is one."""
    kept = document.kept
    if isinstance(kept, StoredText):
        parts: Iterable[str | StoredText] = kept.split(_cut_blocks(kept.chunks()))
    else:
        parts = _cut_blocks([document.text])
    for number, part in enumerate(parts):
        yield Document(f"{document.name}#{number:09d}", part)


def _cut_blocks(chunks: Iterable[str]) -> Iterator[str]:
    text, begin = "", 0
    for chunk in chunks:
        text, begin = text[begin:] + chunk if begin < len(text) else chunk, 0
        while len(text) - begin > _BLOCK_CHARS:
            end = text.rfind("\n", begin, begin + _BLOCK_CHARS) + 1 or begin + _BLOCK_CHARS
            yield text[begin:end]
            begin = end
    if begin < len(text):
        yield text[begin:]
