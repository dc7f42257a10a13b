"""Cores of one machine, each claimed by at most one worker of any run, and threads pinned to them.

A claim is a bound abstract Unix socket named after the core: it leaves no file, other users of the machine see it,
and the kernel drops it with the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from pathlib import Path

log = logging.getLogger(__name__)

#: Name of a core's socket; the same in every process of this machine.
NAME = "ryot/core/{}"


class CoreClaim:
    """Exclusive hold on some cores of this machine until `release` or the end of the process."""

    def __init__(self, count: int, *, timeout_s: float = 5.0):
        """Claim `count` cores of those this process may use; without as many in time `cores` stays empty.

        The parent's cores are looked at: Ray reuses worker processes, and an earlier task may have pinned this one.
        """
        self._candidates = sorted(os.sched_getaffinity(os.getppid()))
        self.cores: list[int] = []
        self._sockets: list[socket.socket] = []
        deadline = time.monotonic() + timeout_s
        while not self._try_claim(count) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _try_claim(self, count: int) -> bool:
        for core in self._candidates:
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind("\0" + NAME.format(core))
            except OSError:
                claim.close()
                continue
            self.cores.append(core)
            self._sockets.append(claim)
            if len(self.cores) == count:
                return True
        self.release()
        return False

    def release(self) -> None:
        """Give the cores back."""
        for claim in self._sockets:
            claim.close()
        self.cores, self._sockets = [], []


def pin_process(cores: list[int]) -> None:
    """Restrict every thread of this process, and all it will start, to `cores`."""
    for task in Path("/proc/self/task").iterdir():
        # `sched_setaffinity(0)` would move the calling thread alone; a thread may end meanwhile.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


def has_cpu_quota() -> bool:
    """Whether a container limits this process to CPU time rather than to cores of its own.

    Several such containers on one machine all see core 0, so pinning would stack them on it.
    """
    for path in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        with contextlib.suppress(OSError):
            return not Path(path).read_text().startswith(("max", "-1"))
    return False
