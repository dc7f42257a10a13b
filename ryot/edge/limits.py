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
    """A new group below this process's own that holds its processes to `limit_bytes`; None where that is impossible.

    Swap is closed to the group, where the kernel counts it.
    """
    place = _own_group()
    if place is None:
        log.info("no memory controller is mounted; memory limits are only checked afterwards")
        return None
    parent, version = place
    folder = parent / f"{PREFIX}{os.getpid()}-{next(_serial)}"
    limit, swap, no_swap = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", str(limit_bytes))
        if version == 1
        else ("memory.max", "memory.swap.max", "0")
    )
    try:
        _remove_stale(parent)
        if version == 2:
            _delegate_memory(parent)
        folder.mkdir()
    except OSError as error:
        log.info("%s: no control group can be made (%s); memory limits are only checked", parent, error.strerror)
        return None
    try:
        (folder / limit).write_text(str(limit_bytes))
    except OSError as error:
        log.info("%s: no limit can be set (%s); memory limits are only checked", folder, error.strerror)
        folder.rmdir()
        return None
    with contextlib.suppress(OSError):  # a kernel that does not count swap has no such file
        (folder / swap).write_text(no_swap)
    return MemoryCgroup(folder, version, limit_bytes)


def _own_group() -> tuple[Path, int] | None:
    """The folder of this process's memory control group, and the version of its hierarchy."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return None
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in groups)}
    for left, right in mounts:
        _, _, _, root, mount_point, *_ = left.split()
        kind, _, *options = right.split()
        if kind == "cgroup" and "memory" in options[-1].split(","):
            found = next((path for names, path in paths.items() if "memory" in names.split(",")), None)
            version = 1
        elif kind == "cgroup2" and "memory" in _controllers(Path(mount_point)):
            found, version = paths.get(""), 2
        else:
            continue
        if found is None:
            continue
        # Inside a container the mount's root is the container's own group.
        inside = os.path.relpath(found, root) if found.startswith(root) else "."
        folder = Path(mount_point, inside)
        return (folder if folder.is_dir() else Path(mount_point)), version
    return None


def _controllers(mount_point: Path) -> list[str]:
    try:
        return (mount_point / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _delegate_memory(parent: Path) -> None:
    """Let groups below `parent` have memory limits (version 2); fails where `parent` itself has processes."""
    control = parent / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")


def _remove_stale(parent: Path) -> None:
    """Remove groups left by measuring parents that were killed."""
    for folder in parent.glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        if not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
