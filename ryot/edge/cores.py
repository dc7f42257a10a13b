"""How many cores this process may use: what its affinity and the CPU time of its control groups leave."""

from __future__ import annotations

import math
import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def count_usable_cores() -> int:
    """Cores that can be kept busy at once, at least one."""
    cores = len(os.sched_getaffinity(0))
    quota = read_quota(_read(Path("/proc/self/cgroup")), GROUPS)
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def read_quota(cgroups: str, mounted: Path) -> float | None:
    """CPU time a second that the groups of a process have, the least of any of them; None where none is limited.

    From the text of its /proc/PID/cgroup and where the groups are mounted (cgroups(7)). Inside a container the mount's
    root is the container's own group, so a group that is not there is looked for at the root.
    """
    quotas = []
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        top = mounted / controllers if controllers and (mounted / controllers).is_dir() else mounted
        top = top / "cpu" if controllers and top == mounted else top
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if (quota := _quota_of(folder)) is not None:
                quotas.append(quota)
            if folder == top:
                break
    return min(quotas, default=None)


def _quota_of(folder: Path) -> float | None:
    fields = _read(folder / "cpu.max").split() or [
        _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    if len(fields) == 2 and all(field.isdigit() for field in fields) and int(fields[1]):
        return int(fields[0]) / int(fields[1])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
