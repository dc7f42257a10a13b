"""Temporary folders that nobody has to remember: locked while their owner lives, and gone with it however it ends.

The names begin with `ryot-`. A process that is killed cannot clean up, so a small one waits beside it and does; where
both are killed, whoever makes a folder of the same kind first removes those whose lock is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK_FILE = "owner.lock"

#: Waits until the other end of its stdin is closed, which the end of its owner does, and removes a folder. Nobody's
#: child: Ray ends the children of a worker with it.
_REAPER = """
import os, shutil, signal, sys
if os.fork():
    os._exit(0)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.read(0, 1)
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A private folder `ryot-PURPOSE-…` in the system's temporary folder for as long as the block lasts."""
    base, prefix = Path(tempfile.gettempdir()), f"ryot-{purpose}-"
    sweep_stale(base, prefix)
    folder, lock = make_folder(base, prefix)
    try:
        with _reaper(folder):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


@contextlib.contextmanager
def _reaper(folder: Path) -> Iterator[None]:
    """Remove `folder` when the block or this process ends, by SIGKILL too."""
    # A session of its own: what is sent to all processes of a terminal or a job does not end it.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _REAPER, folder],
        # Without the mark of an embedded cluster, all of whose processes are killed when its driver dies.
        env={name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ):
        yield


def make_folder(base: Path, prefix: str) -> tuple[Path, int]:
    """A fresh private folder and the descriptor that keeps it locked; raises `OSError`."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    descriptor = _lock_folder(folder)
    assert descriptor is not None, "a fresh folder has no other owner"
    return folder, descriptor


def sweep_stale(
    base: Path, prefix: str, *, remove: Callable[[Path], None] | None = None, min_age_s: float = 10.0
) -> list[Path]:
    """Remove the folders that `make_folder` made under `base` and whose owner is dead; returns them.

    A folder younger than `min_age_s` may not have been locked by its owner yet and is left alone. `remove` is what to
    do with one that takes more than deleting.
    """
    removed = []
    for folder in base.glob(f"{prefix}*"):
        try:
            info = folder.lstat()
        except OSError:
            continue
        mine = info.st_uid == os.getuid() and (folder / LOCK_FILE).exists()
        if not mine or folder.is_symlink() or time.time() - info.st_mtime < min_age_s:
            continue
        if (descriptor := _lock_folder(folder)) is not None:
            if remove:
                remove(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
            removed.append(folder)
    return removed


def _lock_folder(folder: Path) -> int | None:
    """The locked descriptor of a folder, or None when its owner still lives."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
