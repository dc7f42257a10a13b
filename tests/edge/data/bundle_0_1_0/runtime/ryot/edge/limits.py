"""Holding a child process to a device's memory: a cgroup of its own, of version 1 or 2, where the system allows it.

An address-space limit (`ulimit -v`) would not do: it counts what is reserved, several times what is resident.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = "ryot-measure-"
_serial = itertools.count()


class MemoryCgroup:
    """A control group with a memory limit; a context manager that removes it at the end.

    The child enters it before it executes Python (see `wrap`), so all that it ever allocates is counted. Files that
    others have read before, such as shared libraries in the page cache, are not; so the peak is compared as well.
    """

    def __init__(self, folder: Path, version: int, limit_bytes: int):
        self.folder = folder
        self._version = version
        self.limit_bytes = limit_bytes

    def wrap(self, command: list[str]) -> list[str]:
        """`command`, started by a shell that first moves itself into the group."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", enter, str(self.folder / "cgroup.procs"), *command]

    def was_killed(self) -> bool:
        """Whether the kernel killed a process of the group at its limit."""
        name = "memory.oom_control" if self._version == 1 else "memory.events"
        fields = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(fields.get("oom_kill", 0)) > 0

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.folder.rmdir()
        except OSError as error:
            log.warning("%s: the control group cannot be removed (%s)", self.folder, error.strerror)


def open_memory_cgroup(limit_bytes: int) -> MemoryCgroup | None:
    """A new group near this process's own that holds its processes to `limit_bytes`; None where that is impossible.

    Swap is closed to the group, where the kernel counts it.
    """
    place = find_memory_group(_read("/proc/self/cgroup"), _read("/proc/self/mountinfo"))
    if place is None:
        log.info("no memory controller is mounted; memory limits are only checked afterwards")
        return None
    group, version, top = place
    try:
        parent = group if version == 1 else _find_delegated(group, top)
        _remove_stale(parent)
        folder = parent / f"{PREFIX}{os.getpid()}-{next(_serial)}"
        folder.mkdir()
    except OSError as error:
        log.info("%s: no control group can be made (%s); memory limits are only checked", group, error.strerror)
        return None
    limit, swap, no_swap = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", str(limit_bytes))
        if version == 1
        else ("memory.max", "memory.swap.max", "0")
    )
    try:
        (folder / limit).write_text(str(limit_bytes))
    except OSError as error:
        log.info("%s: no limit can be set (%s); memory limits are only checked", folder, error.strerror)
        folder.rmdir()
        return None
    with contextlib.suppress(OSError):  # a kernel that does not count swap has no such file
        (folder / swap).write_text(no_swap)
    return MemoryCgroup(folder, version, limit_bytes)


def find_memory_group(cgroups: str, mounts: str) -> tuple[Path, int, Path] | None:
    """Folder, version and mount point of the memory hierarchy's group that a process is in.

    From the texts of its /proc/PID/cgroup and /proc/PID/mountinfo (proc(5), cgroups(7)). A version 1 hierarchy comes
    first: where both are mounted the controller can be in one only, and is listed there.
    """
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in cgroups.splitlines())}
    found: dict[int, tuple[Path, int, Path]] = {}
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        _, _, _, root, mount_point, *_ = left.split()
        kind, _, *options = right.split()
        if kind == "cgroup" and "memory" in options[-1].split(","):
            path, version = next((p for names, p in paths.items() if "memory" in names.split(",")), None), 1
        elif kind == "cgroup2" and "memory" in _read(f"{mount_point}/cgroup.controllers").split():
            path, version = paths.get(""), 2
        else:
            continue
        if path is not None:
            top = Path(mount_point)
            # Inside a container the mount's root is the container's own group.
            folder = top / os.path.relpath(path, root) if path.startswith(root) else top
            found[version] = (folder if folder.is_dir() else top), version, top
    return found.get(1) or found.get(2)


def _find_delegated(group: Path, top: Path) -> Path:
    """The nearest group, from `group` up, below which groups have memory limits (version 2), or can get them.

    A group that holds processes cannot; its parent does already, or `group` would have no limit itself.
    """
    refused = None
    for candidate in (group, *group.parents):
        control = candidate / "cgroup.subtree_control"
        try:
            if "memory" not in control.read_text().split():
                control.write_text("+memory")
            return candidate
        except OSError as error:
            refused = refused or error
        if candidate == top:
            break
    raise refused or OSError("no group")


def _remove_stale(parent: Path) -> None:
    """Remove groups left by measuring parents that were killed."""
    for folder in parent.glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        if not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
