"""Finding the control group whose memory can be limited, in the layouts that systems have.

The machine's own layout is used for real in test_measure.py; the others are fake trees, for want of such a machine.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ryot.edge.limits import PREFIX, find_memory_group, open_memory_cgroup


def mount(kind: str, point: Path, root: str = "/", options: str = "rw") -> str:
    return f"35 31 0:32 {root} {point} rw,relatime - {kind} cgroup {options}\n"


def test_version_1_has_a_hierarchy_for_memory(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "a").mkdir(parents=True)
    cgroups = "9:name=systemd:/\n4:memory:/jobs/a\n3:cpuset:/\n0::/\n"
    mounts = mount("cgroup", Path("/other"), options="rw,cpuset") + mount("cgroup", tmp_path, options="rw,memory")
    assert find_memory_group(cgroups, mounts) == (tmp_path / "jobs" / "a", 1, tmp_path)


def test_version_2_has_one_hierarchy_for_all(tmp_path: Path) -> None:
    (tmp_path / "user.slice").mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    assert find_memory_group("0::/user.slice\n", mount("cgroup2", tmp_path)) == (tmp_path / "user.slice", 2, tmp_path)


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    cgroups = "4:memory:/docker/abc\n"
    assert find_memory_group(cgroups, mount("cgroup", tmp_path, "/docker/abc", "rw,memory")) == (tmp_path, 1, tmp_path)
    # Without a namespace of its own it may see a path that is not mounted.
    assert find_memory_group(cgroups, mount("cgroup", tmp_path, "/", "rw,memory")) == (tmp_path, 1, tmp_path)


def test_without_a_memory_controller_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu pids\n")
    assert find_memory_group("0::/\n", mount("cgroup2", tmp_path)) is None
    assert find_memory_group("", "") is None


def test_groups_of_killed_parents_are_removed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cgroup = open_memory_cgroup(1 << 30)
    if cgroup is None:
        pytest.skip(caplog.messages[-1])
    with cgroup:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        stale = cgroup.folder.parent / f"{PREFIX}{gone.pid}-0"
        stale.mkdir()
        other = open_memory_cgroup(1 << 30)
        assert other is not None
        with other:
            assert not stale.exists()
            assert cgroup.folder.exists()
    assert not cgroup.folder.exists()
    assert not list(cgroup.folder.parent.glob(f"{PREFIX}{os.getpid()}-*"))
