"""Text that a run learns from: found, read, hashed and split into training, validation and test."""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ryot.errors import ConfigError, DataError

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
    text: str

    @property
    def split(self) -> str:
        """`train`, `val` or `test`, by a hash of the name.

        Of the usual hashes, BLAKE2s splits the default corpus nearest to 92/4/4 in bytes: 92.2/4.0/3.8.
        """
        bucket = int.from_bytes(hashlib.blake2s(self.name.encode()).digest()[:4]) % 100
        return SPLITS[sum(bucket >= bound for bound in _BOUNDS)]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents sorted by name, and the hash that loss figures hold for."""

    name: str
    documents: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """Hash of all names and texts."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name, document.text):
                data = part.encode()
                digest.update(len(data).to_bytes(8) + data)
        return digest.hexdigest()

    def texts(self, split: str) -> list[str]:
        """The texts of one split, in order."""
        return [d.text for d in self.documents if d.split == split]


def load_corpus(paths: Sequence[str] = ()) -> Corpus:
    """The user's files, folders and globs, or the standard library's source when there are none.

    A `.jsonl` file holds one document a line, in its `text` field. Hidden files are passed over.
    Raises `ConfigError` for a path that does not exist, `DataError` for text that cannot be used.
    """
    if not paths:
        return _standard_library()
    documents: list[Document] = []
    for path in paths:
        for root, file in _find_files(path):
            name = file.relative_to(root).as_posix()
            text = _read_text(file)
            documents += _json_lines(name, text, file) if file.suffix == ".jsonl" else [Document(name, text)]
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise DataError(f"data: {', '.join(paths)} holds no text")
    documents.sort(key=lambda d: (d.name, d.text))
    if len(documents) < _FEW_DOCUMENTS:
        documents = [block for d in documents for block in _cut(d)]
    return Corpus(name=", ".join(Path(p).name for p in paths), documents=tuple(documents))


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


def _find_files(path: str) -> Iterable[tuple[Path, Path]]:
    """(folder that names are relative to, file) of everything that `path` stands for."""
    given = Path(path).expanduser()
    if given.is_dir():
        found = [f for f in sorted(given.rglob("*")) if f.is_file()]
        files = [f for f in found if not any(p.startswith(".") for p in f.relative_to(given).parts)]
        if not files:
            raise DataError(f"data: folder {path} holds no files")
        return [(given, f) for f in files]
    if given.is_file():
        return [(given.parent, given)]
    if glob.has_magic(path) and (matches := sorted(glob.glob(str(given), recursive=True))):  # noqa: PTH207
        return [(Path(m).parent, Path(m)) for m in matches if Path(m).is_file()]
    raise ConfigError(f"data: {path} does not exist", hint="--data takes UTF-8 text files, folders and globs")


def _read_text(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"data: {file} cannot be read ({error.strerror})") from error
    if b"\0" in data[:8192]:
        raise DataError(f"data: {file} is a binary file, expected UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data: {file} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})") from error


def _json_lines(name: str, text: str, file: Path) -> list[Document]:
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"data: {file} line {number} is not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f"data: {file} line {number} has no string field 'text'")
        documents.append(Document(f"{name}#{number:09d}", row["text"]))
    return documents


def _cut(document: Document) -> list[Document]:
    """The document in blocks of about 4096 characters, cut after a line end where there is one."""
    blocks: list[Document] = []
    rest = document.text
    while rest:
        end = len(rest)
        if end > _BLOCK_CHARS:
            end = rest.rfind("\n", 0, _BLOCK_CHARS) + 1 or _BLOCK_CHARS
        blocks.append(Document(f"{document.name}#{len(blocks):09d}", rest[:end]))
        rest = rest[end:]
    return blocks
