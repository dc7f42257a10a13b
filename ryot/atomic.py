"""Files and folders that appear whole and on disk, or not at all: made under another name beside their own."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whose folder is there; what was at `path` stays until all of the new text is on disk."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder that takes the name `target` when the block ends well, all of it on disk, and else vanishes.

    A folder with something in it that is at `target` by then is removed with `replace`, and an `OSError` without.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        for path in (*partial.rglob("*"), partial):
            fsync(path)
        if replace and target.exists():
            _swap(partial, target)
        else:
            partial.replace(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_to_all(folder: Path) -> None:
    """Make what is in a folder readable by all, whatever the umask: whoever runs it on a device may be another user."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def fsync(path: Path) -> None:
    """Put the content of a file, or the names in a folder, on disk; folders where the file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # Some shared file systems know no fsync of a folder, and a folder may be writable without being readable.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def _swap(partial: Path, target: Path) -> None:
    """Give the finished folder the name of one that is there; that one comes back if this fails, and goes if not."""
    old = partial.with_name(f"{partial.name}-old")
    try:
        target.replace(old)
        partial.replace(target)
    finally:
        if old.exists() and not target.exists():
            old.replace(target)
        shutil.rmtree(old, ignore_errors=True)
