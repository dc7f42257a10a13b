"""A bundle as one file: `.tar.zst`, the same bytes for the same bundle, and unpacked with nothing taken on trust.

The manifest comes first, so that unpacking knows every other file's name, size and hash before it meets it: what is not
listed, comes twice, is longer or shorter, or is no plain file ends it, whatever the archive says of itself. Signatures
and record come next: who signed, and whether the disk has room, is known before any other file is written. Headers
must be the very bytes that packing writes. A skippable frame at the end, which other programs pass over, holds the
sha256 of all before it. Reproducible for one version of libzstd.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from ryot.atomic import atomic_folder, open_to_all
from ryot.edge.bundle import MANIFEST_NAME, RECORD_NAME, Bundle, FileEntry, check_inside, load_bundle, read_manifest
from ryot.edge.trust import SIGNATURE_NAME, UNLISTED, Signer, TrustedKeys, check_listed, check_signatures, check_whole
from ryot.errors import BundleError, ConfigError

LEVEL = 12
#: A skippable frame (RFC 8878, 3.1.2): magic number, length, content.
_TRAILER_HEAD = bytes.fromhex("502a4d18") + (32).to_bytes(4, "little")
TRAILER_BYTES = len(_TRAILER_HEAD) + 32
#: What the manifest may have at most, and the record and the signatures: nothing lists their size.
MAX_MANIFEST_BYTES, MAX_UNLISTED_BYTES = 16_000_000, 64_000_000
MAX_FILES = 10_000
#: Unpacked bytes per byte of an archive, beside the first `MAX_UNLISTED_BYTES`: far more than weights come to, and far
#: less than zeros.
MAX_RATIO = 100
_BLOCK = 512
_CHUNK = 1 << 20
#: Memory that an archive may ask for to be unpacked: 128 MiB, twice what level 19 does.
_MAX_WINDOW = 1 << 27


def pack_bundle(folder: Path, target: Path) -> Path:
    """Write the whole bundle in `folder` as an archive, which appears whole or not at all."""
    bundle = load_bundle(folder)
    check_listed(bundle)
    first = [name for name in (MANIFEST_NAME, SIGNATURE_NAME, RECORD_NAME) if (folder / name).exists()]
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=False)
            with compressor.stream_writer(file, closefd=False) as out:
                for name in (*first, *sorted(bundle.files)):
                    size = (folder / name).stat().st_size
                    out.write(_header(name, size))
                    with (folder / name).open("rb") as content:
                        while chunk := content.read(_CHUNK):
                            out.write(chunk)
                    out.write(bytes(-size % _BLOCK))
                out.write(bytes(2 * _BLOCK))
        digest = _digest(partial, partial.stat().st_size)
        with partial.open("ab") as file:
            file.write(_TRAILER_HEAD + digest)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise ConfigError(f"archive {target}: cannot be written ({error.strerror or error})") from error
    except ValueError as error:
        raise BundleError(
            f"bundle {folder}: a name is too long or a file too large for an archive ({error})"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def unpack_archive(archive: Path, target: Path, keys: TrustedKeys | None = None) -> tuple[Bundle, Signer | None]:
    """Unpack an archive to the folder `target`, which appears whole and verified or not at all; who signed it, as well.

    Files are readable by all and folders open to all, whatever the umask. Raises `BundleError` for an archive that is
    damaged, or holds anything but its manifest's files.
    """
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists; an archive is unpacked to a new or empty folder")
    try:
        with archive.open("rb") as file:
            length = _check_trailer(archive, file)
            with atomic_folder(target) as stage:
                _unpack(archive, file, length, stage, keys)
                open_to_all(stage)
                check_whole(stage, keys)
    except zstandard.ZstdError as error:
        raise _refused(archive, f"cannot be decompressed ({error})") from error
    except OSError as error:
        raise ConfigError(f"archive {archive}: {error.filename or target}: {error.strerror or error}") from error
    return check_whole(target, keys)


def is_archive(path: Path) -> bool:
    """Whether a path is a file, and so no bundle's folder."""
    return path.is_file()


def _check_trailer(archive: Path, file: BinaryIO) -> int:
    """Bytes before the trailer. Raises `BundleError` when their hash is not the one that it holds."""
    length = os.fstat(file.fileno()).st_size - TRAILER_BYTES
    if length > 0:
        file.seek(length)
        if file.read(TRAILER_BYTES) == _TRAILER_HEAD + _digest(archive, length):
            file.seek(0)
            return length
    raise _refused(archive, "was changed or cut short, or was not made by 'ryot-deploy pack'")


def _digest(path: Path, length: int) -> bytes:
    found = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(min(_CHUNK, length - file.tell())), b""):
            found.update(chunk)
    return found.digest()


def _unpack(archive: Path, file: BinaryIO, length: int, stage: Path, keys: TrustedKeys | None) -> None:
    def compressed() -> Iterator[bytes]:
        while chunk := file.read(min(_CHUNK, length - file.tell())):
            yield chunk

    source = _Source(compressed())
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    with decompressor.stream_reader(source, read_across_frames=True) as stream:  # type: ignore[arg-type]
        reader = _TarReader(archive, stream)
        header = reader.next_header()
        if header is None or header[0] != MANIFEST_NAME:
            raise _refused(archive, f"does not begin with {MANIFEST_NAME}")
        reader.write(header[1], stage / MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)
        listed = _listed(archive, stage)
        _check_room(archive, length, sum(entry.bytes for entry in listed.values()), stage)
        checked = False
        left: dict[str, FileEntry | None] = {SIGNATURE_NAME: None, RECORD_NAME: None, **listed}
        while (header := reader.next_header()) is not None:
            name, size = header
            if name not in left:
                raise _refused(archive, f"holds {name!r}, which its manifest does not list, or which came already")
            entry = left.pop(name)
            if entry is not None and size != entry.bytes:
                raise _refused(archive, f"{name!r} has {size} bytes there, the manifest says {entry.bytes}")
            if entry is not None and not checked:
                check_signatures(stage, keys)
                checked = True
            elif entry is None and checked:
                raise _refused(archive, f"{name!r} comes behind other files, so that it could not be checked first")
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            reader.write(size, path, limit=MAX_UNLISTED_BYTES if entry is None else entry.bytes)
        if missing := [name for name, entry in left.items() if entry is not None]:
            raise _refused(archive, f"lacks {missing[0]!r}")
        reader.check_end()


def _check_room(archive: Path, length: int, unpacked: int, stage: Path) -> None:
    """Raise for files that no archive of `length` bytes holds (`BundleError`), or no room for them (`ConfigError`)."""
    if unpacked > MAX_RATIO * length + MAX_UNLISTED_BYTES:
        raise _refused(
            archive, f"has {length} bytes and would unpack to {unpacked}, expected at most {MAX_RATIO} for each"
        )
    if unpacked > (free := shutil.disk_usage(stage).free):
        raise ConfigError(
            f"archive {archive}: unpacks to {unpacked / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free there",
            hint="make room, or unpack it elsewhere",
        )


def _listed(archive: Path, stage: Path) -> dict[str, FileEntry]:
    """The files of the manifest that came first; whether it is a good one is seen when the bundle is loaded."""
    files = read_manifest(stage).get("files")
    if not isinstance(files, dict) or len(files) > MAX_FILES:
        raise _refused(archive, f"its manifest lists {len(files or ())} files, at most {MAX_FILES} are unpacked")
    found: dict[str, FileEntry] = {}
    for name, values in files.items():
        try:
            check_inside(name)
            found[name] = FileEntry(str(values["sha256"]), int(values["bytes"]))
            if found[name].bytes < 0 or name in UNLISTED:
                raise ValueError(name)
        except (KeyError, TypeError, ValueError) as error:
            raise _refused(archive, f"its manifest says nothing sensible of {name!r}") from error
    return found


class _Source:
    """What the decompressor reads from."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        if not self._rest:
            self._rest = next(self._chunks, b"")
        part, self._rest = self._rest[:size], self._rest[size:]
        return part


class _TarReader:
    """Reads the one kind of tar that packing writes."""

    def __init__(self, archive: Path, stream: zstandard.ZstdDecompressionReader):
        self._archive, self._stream = archive, stream

    def next_header(self) -> tuple[str, int] | None:
        """Name and size of the next file; None at the end."""
        block = self._read(_BLOCK)
        if block == bytes(_BLOCK):
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            if block != _header(info.name, info.size):
                raise ValueError
        except (tarfile.HeaderError, UnicodeError, ValueError) as error:
            raise _refused(self._archive, "holds something that is no plain file of a bundle") from error
        return info.name, info.size

    def write(self, size: int, path: Path, *, limit: int) -> None:
        if size > limit:
            raise _refused(self._archive, f"{path.name} has {size} bytes there, at most {limit} are unpacked")
        with path.open("xb") as out:
            for begin in range(0, size, _CHUNK):
                out.write(self._read(min(_CHUNK, size - begin)))
        if any(self._read(-size % _BLOCK)):
            raise _refused(self._archive, f"holds data behind {path.name}")

    def check_end(self) -> None:
        if any(self._read(_BLOCK)) or self._stream.read(1):
            raise _refused(self._archive, "goes on behind its end")

    def _read(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            part = self._stream.read(left)
            if not part:
                raise _refused(self._archive, "is cut short")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def _header(name: str, size: int) -> bytes:
    """A file's header in ustar form, without owner, time or any other fact of this machine."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def _refused(archive: Path, reason: str) -> BundleError:
    return BundleError(f"archive {archive}: {reason}", hint="pack or copy it again; nothing was unpacked")
