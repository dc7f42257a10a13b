"""The process that outlives a driver and removes what its embedded cluster leaves behind.

    python -I -S reaper.py FOLDER

It waits until its standard input closes, which happens when the driver closes it or dies in any way, SIGKILL
included. Then it kills every process whose environment carries `RYOT_CLUSTER=FOLDER` and removes FOLDER.
It runs by path and needs only the standard library, so that it starts in some 20 ms and holds 10 MB.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

#: In the environment of each process of an embedded cluster; its value is the cluster's folder.
MARK = "RYOT_CLUSTER"

PREFIX = "ryot-ray-"


def find_marked(folder: Path, programs: tuple[str, ...] = ()) -> list[int]:
    """Ids of the living processes that belong to the cluster in `folder`, this process excepted.

    With `programs` only those that run an executable of one of these names.
    """
    mark = f"{MARK}={folder}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        # A process that ends meanwhile, is a zombie or belongs to someone else cannot be read.
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0") and (
                not programs or (process / "exe").readlink().name in programs
            ):
                found.append(int(process.name))
    return found


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end_marked(folder: Path, *, grace_s: float = 10.0) -> list[int]:
    """Kill the processes of the cluster in `folder` until none is left; returns those that outlived `grace_s`.

    None is left when two looks find none: the environment of a program reads empty while it is being started.
    """
    deadline = time.monotonic() + grace_s
    before: list[int] | None = None
    while (alive := find_marked(folder)) != before or alive:
        if time.monotonic() > deadline:
            break
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        before = alive
        time.sleep(0.02)
    return alive


def remove_cluster(folder: Path) -> None:
    """End the processes of the cluster in `folder` and remove the folder."""
    end_marked(folder)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    remove_cluster(folder)


if __name__ == "__main__":
    main()
