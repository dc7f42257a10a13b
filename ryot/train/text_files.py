"""Files that hold text: found under what the user names, unpacked, decoded, each fault told with its place."""

from __future__ import annotations

import fnmatch
import glob
import gzip
import itertools
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ryot.errors import ConfigError, DataError
from ryot.train.records import RECORD_FIELDS, Record, read_record

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PACKED = (".gz", ".zst")
_PARQUET_ROWS = 1024


def show_path(path: Path | str) -> str:
    r"""A path as text that UTF-8 can hold, the same in every locale; bytes that are not UTF-8 stand as `\xNN`."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def find_files(path: str) -> list[tuple[str, Path]]:
    """(name, file) of everything that `path`, a file, folder or glob, stands for.

    Names are relative to the folder, and lack the suffix of a compressed file.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"data: {show_path(path)}: {error}") from error
    if given.is_dir():
        if not (files := _walk(given)):
            raise DataError(f"data: folder {show_path(path)} holds no files")
        return [(_name(f.relative_to(given)), f) for f in files]
    if given.is_file():
        return [(_name(Path(given.name)), given)]
    if glob.has_magic(path) and (matches := _expand(str(given))):
        return [(_name(Path(f.name)), f) for f in matches]
    if given.exists():
        raise ConfigError(f"data: {show_path(path)} is neither a file nor a folder")
    raise ConfigError(
        f"data: {show_path(path)} does not exist", hint="--data takes UTF-8 text files, folders and globs"
    )


def holds_rows(name: str) -> bool:
    """Whether a file of this name has a document in each line or row."""
    return name.endswith((".jsonl", ".parquet"))


def read_rows(name: str, file: Path) -> Iterator[tuple[str, str | Record]]:
    """(name, text or record) of each document in a file: each line of a `.jsonl`, each row of a `.parquet`.

    Raises `DataError` with file, line and reason for what is no text.
    """
    if name.endswith(".jsonl"):
        for number, line in enumerate(_lines(_read_chunks(file)), start=1):
            if line.strip():
                yield f"{name}#{number:09d}", _read_json(line, f"data: {show_path(file)} line {number}")
    else:
        for number, row in enumerate(_parquet_rows(file), start=1):
            yield f"{name}#{number:09d}", read_record(row, f"data: {show_path(file)} row {number}")


def read_text(file: Path) -> Iterator[str]:
    """The text of a file in parts. Raises `DataError` with file, line and reason for what is no text."""
    offset, lines, rest = 0, 0, b""
    for chunk in itertools.chain(_read_chunks(file), [b""]):
        data, is_last = rest + chunk, not chunk
        try:
            text, rest = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if is_last or error.end < len(data) or error.reason != "unexpected end of data":
                number = lines + data.count(b"\n", 0, error.start) + 1
                where = _where(error, offset)
                raise DataError(f"data: {show_path(file)} line {number} is not UTF-8 ({where})") from error
            # A character that the next part completes.
            text, rest = data[: error.start].decode("utf-8"), data[error.start :]
        yield text
        offset += len(data) - len(rest)
        lines += text.count("\n")


def _name(path: Path) -> str:
    return show_path(path.with_suffix("") if path.suffix in _PACKED else path)


def _expand(pattern: str) -> list[Path]:
    """The files that a glob stands for; `**` enters linked folders once and loops not at all (Python's does)."""
    base, recursive, rest = pattern.partition("**")
    found = sorted(Path(match) for match in glob.glob(base if recursive else pattern))  # noqa: PTH207
    if not recursive:
        return [f for f in found if f.is_file()]
    parts = f"**{rest}".split("/")
    tops = found or ([] if base else [Path()])
    return [f for top in tops if top.is_dir() for f in _walk(top) if _matches(f.relative_to(top).parts, parts)]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not parts:
        return not parts and all(p == "**" for p in pattern)
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _walk(root: Path) -> list[Path]:
    """Every file below a folder but hidden ones; a folder that several links lead to, or a loop, is entered once.

    Links come last, so that a folder below `root` keeps its own name.
    """
    files: list[Path] = []
    entered: set[tuple[int, int]] = set()
    tops = [root]
    for top in tops:
        for folder, folders, names in os.walk(top, onerror=_refuse):
            info = Path(folder).stat()
            if (info.st_dev, info.st_ino) in entered:
                folders.clear()
                continue
            entered.add((info.st_dev, info.st_ino))
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            tops += [link for f in folders if (link := Path(folder, f)).is_symlink()]
            for file in (Path(folder, n) for n in sorted(names) if not n.startswith(".")):
                if file.is_file():
                    files.append(file)
                elif file.is_symlink():
                    log.warning("data: %s is passed over, its link leads nowhere", show_path(file))
    return files


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"data: {show_path(error.filename)} cannot be read ({error.strerror})") from error


def _read_chunks(file: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked and without a byte order mark."""
    first = True
    try:
        for chunk in _unpack(file):
            if first:
                if b"\0" in chunk[:8192]:
                    raise DataError(
                        f"data: {show_path(file)} is a binary file, expected UTF-8 text",
                        hint="of compressed text, .gz and .zst are read",
                    )
                chunk = chunk.removeprefix(_BOM)
                first = False
            yield chunk
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"data: {show_path(file)} is damaged or cut short ({error})") from error
    except OSError as error:
        raise DataError(f"data: {show_path(file)} cannot be read ({error.strerror or error})") from error


def _unpack(file: Path) -> Iterator[bytes]:
    if file.suffix == ".zst":
        yield from _unpack_zstd(file)
        return
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _unpack_zstd(file: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise DataError(
            f"data: {show_path(file)} is compressed with zstd, which this Python cannot read",
            hint="pip install zstandard",
        ) from error
    # A file may be several frames; zstd --long uses windows of up to 2 GiB.
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    try:
        with file.open("rb") as stream:
            packed = b""
            while packed := packed or stream.read(_CHUNK_BYTES):
                frame = frame or unpacker.decompressobj()
                if data := frame.decompress(packed):
                    yield data
                packed = b""
                if frame.eof:
                    packed, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise EOFError(error) from error
    if frame:
        raise EOFError("the last frame has no end")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Lines that end at `\n` and nowhere else: JSON may hold every other line separator inside a string."""
    parts: list[bytes] = []
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        for line in rest:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)


def _read_json(line: bytes, place: str) -> str | Record:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 ({_where(error)})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} cannot be read as JSON ({error})") from error
    return read_record(row if isinstance(row, dict) else {}, place)


def _parquet_rows(file: Path) -> Iterator[dict[str, object]]:
    """The rows of a Parquet file, a part of it in memory at a time; of its columns those that records have."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"data: {show_path(file)} is a Parquet file, which this Python cannot read", hint="pip install pyarrow"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = [name for name in table.schema_arrow.names if name in RECORD_FIELDS]
            if not columns:
                raise DataError(
                    f"data: {show_path(file)} has the columns {', '.join(table.schema_arrow.names)}, expected "
                    "messages, prompt and completion, or text"
                )
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data: {show_path(file)} is damaged or no Parquet file ({error})") from error


def _where(error: UnicodeDecodeError, offset: int = 0) -> str:
    return f"byte {error.object[error.start]:#04x} at offset {offset + error.start}"
