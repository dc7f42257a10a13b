"""The texts of a corpus, in a file where they are too much for memory, read back one by one."""

from __future__ import annotations

import codecs
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ryot.errors import DataError

#: Texts of so many bytes together stay in memory.
MEMORY_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20


class TextStore:
    """Texts one behind the other in UTF-8, kept as long as one of them is; for one thread at a time."""

    def __init__(self) -> None:
        # Where /tmp is memory, /var/tmp is not.
        folders = [os.environ.get("TMPDIR", ""), "/var/tmp"]
        self._folder = next((f for f in folders if f and os.access(f, os.W_OK)), tempfile.gettempdir())
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES, dir=self._folder)  # noqa: SIM115
        self._size = 0

    def add(self, chunks: Iterable[str], *, is_record: bool = False) -> StoredText | None:
        """Take a text in, given in parts; None for one that is white space alone."""
        at, num_chars, blank, digest = self._size, 0, True, _new_digest()
        for chunk in chunks:
            data = chunk.encode()
            self._write(data)
            digest.update(data)
            num_chars += len(chunk)
            blank = blank and (not chunk or chunk.isspace())
        if blank:
            return None
        return StoredText(self, at, self._size - at, num_chars, digest.digest(), is_record)

    def read(self, at: int, size: int) -> bytes:
        """Some of the bytes."""
        self._file.seek(at)
        return self._file.read(size)

    def _write(self, data: bytes) -> None:
        try:
            self._file.seek(self._size)
            self._file.write(data)
        except OSError as error:
            raise DataError(
                f"data: {self._folder} cannot hold a copy of the text ({error.strerror or error})",
                hint="make room there, or set TMPDIR to another folder",
            ) from error
        self._size += len(data)


@dataclass(frozen=True, slots=True)
class StoredText:
    """Where a text of a store is, and what is asked for often enough to be kept."""

    store: TextStore = field(repr=False, compare=False)
    at: int
    size: int
    """Bytes."""
    num_chars: int
    key: bytes
    """As `text_key` gives it."""
    is_record: bool

    def read(self) -> str:
        """The text."""
        return self.store.read(self.at, self.size).decode()

    def chunks(self) -> Iterator[str]:
        """The text in parts."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for at in range(self.at, self.at + self.size, _CHUNK_BYTES):
            yield decoder.decode(self.store.read(at, min(_CHUNK_BYTES, self.at + self.size - at)))

    def split(self, parts: Iterable[str]) -> Iterator[StoredText]:
        """The parts of the text, given in their order, as texts of their own."""
        at = self.at
        for part in parts:
            data = part.encode()
            yield StoredText(self.store, at, len(data), len(part), text_key(data), self.is_record)
            at += len(data)


def text_key(data: bytes) -> bytes:
    """What copies of a text have in common."""
    digest = _new_digest()
    digest.update(data)
    return digest.digest()


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)
