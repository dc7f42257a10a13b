"""The journal and the run lock, without Ray."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ryot.errors import ClusterError
from ryot.run.folder import RunFolder
from ryot.run.journal import AttemptBegun, CheckpointAccepted, CheckpointRejected, Journal
from ryot.run.lock import RunLock


def test_what_was_appended_is_read_again_in_order(tmp_path: Path) -> None:
    journal = Journal(RunFolder(tmp_path))
    journal.append(CheckpointAccepted(key="a/seed-0", digest="d", attempt=1, step=10, path="p/10", sha256="s10"))
    journal.append(CheckpointAccepted(key="a/seed-0", digest="d", attempt=1, step=20, path="p/20", sha256="s20"))
    journal.append(CheckpointAccepted(key="b/seed-0", digest="d", attempt=1, step=30, path="q/30", sha256="s30"))
    journal.close()
    again = Journal(RunFolder(tmp_path))
    assert [(a.step, a.sha256) for a in again.accepted("a/seed-0", "d")] == [(20, "s20"), (10, "s10")]
    assert again.accepted("a/seed-0", "other inputs") == []


def test_a_last_line_cut_short_is_dropped_and_the_next_one_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(RunFolder(tmp_path))
    journal.append(AttemptBegun(key="a", digest="d", attempt=1))
    journal.close()
    for cut in (b'{"record": "attempt", "key": "a", "att', b"\0\0\0\0\0\0\n"):
        with (tmp_path / "journal.jsonl").open("ab") as file:
            file.write(cut)
        caplog.clear()
        again = Journal(RunFolder(tmp_path))
        assert "cut short" in caplog.text
        again.append(AttemptBegun(key="a", digest="d", attempt=again.next_attempt("a")))
        again.close()
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2, 3]


def test_a_line_damaged_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"record": "opened"}\nnot json\n{"record": "opened"}\n')
    with pytest.raises(ClusterError, match="line 2 is not a journal record"):
        Journal(RunFolder(tmp_path))


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"record": "opened", "schema": 99}\n{"record": "x"}\n')
    with pytest.raises(ClusterError, match="schema 99, expected at most 1"):
        Journal(RunFolder(tmp_path))


def test_a_run_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"record": "opened", "schema": 1, "version": "0.0.1"}\n')
    with pytest.raises(ClusterError, match=r"made by ryot 0\.0\.1, this is"):
        Journal(RunFolder(tmp_path)).open_run()


def test_a_rejected_checkpoint_no_longer_counts(tmp_path: Path) -> None:
    journal = Journal(RunFolder(tmp_path))
    for step in (10, 20):
        journal.append(CheckpointAccepted(key="a", digest="d", attempt=1, step=step, path=f"p/{step}", sha256="s"))
    journal.append(CheckpointRejected(key="a", path="p/20", reason="has changed"))
    assert [a.step for a in journal.accepted("a", "d")] == [10]


def test_a_stage_counts_for_equal_inputs_only(tmp_path: Path) -> None:
    journal = Journal(RunFolder(tmp_path))
    journal.finish_stage("export", "a/seed-0/fp32", "inputs-1", path="forms/fp32")
    assert journal.find_stage("export", "a/seed-0/fp32", "inputs-1") == {"path": "forms/fp32"}
    assert journal.find_stage("export", "a/seed-0/fp32", "inputs-2") is None
    assert journal.find_stage("export", "b/seed-0/fp32", "inputs-1") is None


def test_a_full_disk_leaves_the_journal_whole_and_says_what_to_do(tmp_path: Path) -> None:
    # A file size limit stands in for the full disk: the kernel refuses the write in the same way, after a part of it.
    program = f"""
import resource, signal
from pathlib import Path
from ryot.run.folder import RunFolder
from ryot.run.journal import AttemptBegun, Journal
from ryot.errors import ClusterError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(RunFolder(Path({str(tmp_path)!r})))
journal.append(AttemptBegun(key="a", digest="d", attempt=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (150, 150))
try:
    journal.append(AttemptBegun(key="a" * 200, digest="d", attempt=2))
except ClusterError as error:
    print(error, "|", error.hint)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "cannot be written" in said
    assert "make room, then resume the run" in said
    assert [r.attempt for r in Journal(RunFolder(tmp_path)).records if isinstance(r, AttemptBegun)] == [1]


def test_a_run_is_locked_while_its_driver_lives_and_free_once_it_was_killed(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from ryot.run.folder import RunFolder
from ryot.run.lock import RunLock
lock = RunLock(RunFolder(Path({str(tmp_path)!r})))
print("locked", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ClusterError, match=f"process {holder.pid} on .* is working on it"):
            RunLock(RunFolder(tmp_path))
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    RunLock(RunFolder(tmp_path)).release()
