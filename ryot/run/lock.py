"""The lock on a run folder: one driver at a time."""

from __future__ import annotations

import fcntl
import os
import socket

from ryot.errors import ClusterError
from ryot.run.folder import RunFolder


class RunLock:
    """Exclusive hold on a run folder; the kernel releases it when the driver ends in any way.

    Raises `ClusterError` when another driver holds it.
    """

    def __init__(self, folder: RunFolder):
        try:
            self._fd = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ClusterError(f"run {folder}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another driver"
            os.close(self._fd)
            raise ClusterError(
                f"run {folder}: {holder} is working on it", hint="wait for it, or stop it and resume then"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Release the folder; the lock file stays."""
        os.close(self._fd)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def is_held(folder: RunFolder) -> bool:
    """Whether a driver holds the run folder; nothing is written."""
    try:
        handle = os.open(folder.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
