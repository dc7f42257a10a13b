"""Text that a run learns from: found, read, hashed and split into training, validation and test."""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ryot.errors import DataError
from ryot.train.records import Record, has_answer, question_text, record_text
from ryot.train.text_files import find_files, read_documents, show_path

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
    content: str | Record
    """What is learned from: a text, or a row of prompt and completion, or of messages."""

    @property
    def text(self) -> str:
        """Of a record all of it, as JSON: what it is hashed and compared by. Not kept: it is as large as the record."""
        return self.content if isinstance(self.content, str) else record_text(self.content)

    @property
    def key(self) -> bytes:
        """What copies have in common."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()

    @property
    def own_split(self) -> str:
        """`train`, `val` or `test`, by a hash of a text's name, or of what a record asks: a question is in one split.

        Of the usual hashes, BLAKE2s splits the default corpus nearest to 92/4/4 in bytes: 92.2/4.0/3.8.
        """
        key = self.name if isinstance(self.content, str) else question_text(self.content)
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
        return any(not isinstance(d.content, str) for d in self.documents)

    def split(self, name: str) -> list[Document]:
        """The documents of one split, in order."""
        return [d for d, of in zip(self.documents, self.splits) if of == name]

    def texts(self, split: str) -> list[str]:
        """The texts of one split, in order."""
        return [d.text for d, of in zip(self.documents, self.splits) if of == split]


def load_corpus(paths: Sequence[str] = ()) -> Corpus:
    """The user's files, folders and globs, or the standard library's source when there are none.

    A `.jsonl` file holds one document a line, a `.parquet` file one a row: a `text`, a `prompt` with its `completion`,
    or the `messages` of a chat; `.gz` and `.zst` files are unpacked. Hidden files are passed over. Raises `ConfigError`
    for a path that does not exist, `DataError` for text that cannot be used.
    """
    if not paths:
        return _standard_library()
    documents = []
    empty: list[str] = []
    for path in paths:
        for found, file in find_files(path):
            for name, content in read_documents(found, file):
                if isinstance(content, str):
                    if content and not content.isspace():
                        documents.append(Document(name, content))
                elif has_answer(content):
                    documents.append(Document(name, content))
                else:
                    empty.append(name)
    if empty:
        log.warning("data: %d records have no answer and are left out, the first is %s", len(empty), empty[0])
    if not documents:
        what = "no record with an answer" if empty else "no text"
        raise DataError(f"data: {', '.join(map(show_path, paths))} holds {what}")
    documents.sort(key=lambda d: (d.name, d.content if isinstance(d.content, str) else ""))
    if len(documents) < _FEW_DOCUMENTS or len({d.key for d in documents}) < _FEW_DOCUMENTS:
        documents = [b for d in documents for b in (cut_document(d) if isinstance(d.content, str) else [d])]
    corpus = Corpus(name=", ".join(show_path(Path(p).name) for p in paths), documents=tuple(documents))
    if corpus.num_copies:
        log.warning(
            "data: %d of %d documents are copies of others; each goes into the split of the first one",
            corpus.num_copies,
            len(documents),
        )
    return corpus


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
    text, begin, number = document.text, 0, 0
    while begin < len(text):
        end = begin + _BLOCK_CHARS
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield Document(f"{document.name}#{number:09d}", text[begin:end])
        begin, number = end, number + 1
