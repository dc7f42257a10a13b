"""Temporary folders that are gone when their owner is, however it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ryot.scratch import scratch_folder

OWNER = """
import pathlib, signal, time
from ryot.scratch import scratch_folder
with scratch_folder("test") as folder:
    (folder / "large").write_bytes(bytes(1_000_000))
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_folder_is_gone_when_its_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError), scratch_folder("test") as folder:
        (folder / "part").mkdir()
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda s: s.name)
def test_a_folder_is_gone_when_its_owner_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        assert (folder / "large").exists()
        # To all processes of the terminal, as Ctrl-C does.
        os.killpg(owner.pid, number)
        owner.wait(timeout=20)
    deadline = time.monotonic() + 20
    while folder.exists():
        assert time.monotonic() < deadline, "the folder is still there"
        time.sleep(0.01)


def test_a_folder_is_gone_when_its_owner_is_ended_with_all_its_children(tmp_path: Path) -> None:
    """As Ray ends a worker."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        deadline = time.monotonic() + 20
        process = psutil.Process(owner.pid)
        while any(c.status() != psutil.STATUS_ZOMBIE for c in process.children()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for child in process.children(recursive=True):
            child.kill()
        owner.kill()
    while folder.exists():
        assert time.monotonic() < deadline, "the folder is still there"
        time.sleep(0.01)
