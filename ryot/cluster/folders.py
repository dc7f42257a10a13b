"""Folders as bytes, for clusters whose machines share no path."""

from __future__ import annotations

import errno
import io
import tarfile
from pathlib import Path

from ryot.atomic import atomic_folder
from ryot.errors import ClusterError


def pack_folder(folder: Path) -> bytes:
    """All files of a folder as an uncompressed tar (weights do not compress)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.add(path, arcname=path.relative_to(folder).as_posix(), recursive=False)
    return buffer.getvalue()


def unpack_folder(packed: bytes, folder: Path) -> None:
    """Write what `pack_folder` gave, so that `folder` is there whole or not at all. Raises `ClusterError`."""
    try:
        with atomic_folder(folder) as partial, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(partial, filter="data")
    except tarfile.TarError as error:
        raise ClusterError(f"{folder}: what came is no folder that can be trusted ({error})") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room, then resume the run" if full else None
        raise ClusterError(f"{folder}: cannot be written ({error.strerror})", hint=hint) from error
