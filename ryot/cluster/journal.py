"""The driver's memory: an append-only `journal.jsonl`, one fsynced line a fact, and the lock on a run folder.

A checkpoint counts only when a line here says so, with its sha256; a worker that goes on writing after the driver has
given it up (they do: notes in `cluster/README.md`) writes files that no line names. What is not in the journal did
not happen.

Records: `opened`, `stage` (done, with the digest of its inputs), `attempt`, `checkpoint` (accepted), `rejected` (an
accepted one whose files have changed since), `done` and `failed` (one training).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ryot
from ryot.atomic import fsync
from ryot.errors import ClusterError

log = logging.getLogger(__name__)

FILE = "journal.jsonl"
LOCK_FILE = "run.lock"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Accepted:
    """A checkpoint that counts."""

    path: str
    """Relative to the run folder."""
    sha256: str
    step: int
    attempt: int
    facts: dict[str, Any]
    """What is known about the training at this point: times, losses."""


def parse_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a journal, and the bytes up to a last line that was cut short.

    Raises `ClusterError` for a line damaged elsewhere and for a newer schema.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].splitlines(keepends=True)
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            schema = record.get("schema", SCHEMA)
        except (ValueError, AttributeError) as error:
            if number == len(lines):
                return records, whole - len(line)
            raise ClusterError(
                f"{path}: line {number} is not a JSON object ({error})",
                hint="the file was changed by hand or by the disk; start a new run",
            ) from error
        if schema > SCHEMA:
            raise ClusterError(f"{path}: schema {schema}, expected at most {SCHEMA}", hint="use a newer ryot")
        records.append(record)
    return records, whole


class Journal:
    """The journal of one run folder; open it only while holding the folder's `RunLock`."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / FILE
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ClusterError(f"run {run_dir}: {FILE} cannot be written ({error.strerror})") from error
        self._lock = threading.Lock()
        self.records, whole = parse_journal(self.path)
        if whole < os.fstat(self._fd).st_size:
            # Never acknowledged to anyone: the driver, or the power, went while it was written.
            log.warning("%s: the last line was cut short by a crash and is dropped", self.path)
            os.ftruncate(self._fd, whole)
            os.fsync(self._fd)
        self._by_key: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in self.records:
            self._by_key[record.get("key", "")].append(record)
        fsync(run_dir)

    def append(self, record: str, **fields: Any) -> None:
        """Write one fact; it is on disk when this returns. Threads may call it at once.

        Raises `ClusterError` when it cannot be written (a full disk).
        """
        entry = {"record": record, "time": round(time.time(), 3), **fields}
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            size = os.fstat(self._fd).st_size
            try:
                written = os.write(self._fd, line)
                if written < len(line):
                    raise OSError(28, "No space left on device")
                os.fsync(self._fd)
            except OSError as error:
                os.ftruncate(self._fd, size)
                raise ClusterError(
                    f"{self.path}: cannot be written ({error.strerror})", hint="make room, then resume the run"
                ) from error
            self.records.append(entry)
            self._by_key[entry.get("key", "")].append(entry)

    def open_run(self, **fields: Any) -> None:
        """Say that a driver has taken the run. Raises `ClusterError` for a run of another ryot version."""
        for record in self.records:
            if record["record"] == "opened" and record.get("version") != ryot.__version__:
                raise ClusterError(
                    f"run {self.path.parent}: made by ryot {record.get('version')}, this is {ryot.__version__}",
                    hint="resume with that version, or start a new run",
                )
        self.append(
            "opened", schema=SCHEMA, version=ryot.__version__, pid=os.getpid(), host=socket.gethostname(), **fields
        )

    def finish_stage(self, stage: str, key: str, digest: str, **outputs: Any) -> None:
        """Say that a stage is done for inputs of this digest; `outputs` is what `find_stage` gives back."""
        self.append("stage", stage=stage, key=key, digest=digest, outputs=outputs)

    def find_stage(self, stage: str, key: str, digest: str) -> dict[str, Any] | None:
        """The outputs of a stage that was done with these inputs, or None; its files may be gone."""
        for record in reversed(self._by_key[key]):
            if record["record"] == "stage" and record["stage"] == stage:
                return record["outputs"] if record["digest"] == digest else None
        return None

    def next_attempt(self, key: str) -> int:
        """The number of the next attempt at a training; no number is used twice, whatever the inputs."""
        return 1 + max((r["attempt"] for r in self._by_key[key] if r["record"] == "attempt"), default=0)

    def accepted(self, key: str, digest: str) -> list[Accepted]:
        """The accepted checkpoints of a training with these inputs, newest first, without rejected ones."""
        bad = {r["path"] for r in self._by_key[key] if r["record"] == "rejected"}
        found = [
            Accepted(r["path"], r["sha256"], r["step"], r["attempt"], r.get("facts", {}))
            for r in self._by_key[key]
            if r["record"] == "checkpoint" and r["digest"] == digest and r["path"] not in bad
        ]
        return found[::-1]

    def outcome(self, key: str, digest: str) -> dict[str, Any] | None:
        """The `done` or `failed` record of a training with these inputs, if it has ended."""
        for record in reversed(self._by_key[key]):
            if record["record"] in ("done", "failed") and record["digest"] == digest:
                return record
        return None

    def has_ended(self, key: str, digest: str) -> bool:
        """Whether a training with these inputs is done, or has failed for good."""
        record = self.outcome(key, digest)
        return record is not None and (record["record"] == "done" or record["final"])

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class RunLock:
    """Exclusive hold on a run folder; the kernel releases it when the driver ends in any way.

    Raises `ClusterError` when another driver holds it.
    """

    def __init__(self, run_dir: Path):
        path = run_dir / LOCK_FILE
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ClusterError(f"run {run_dir}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another driver"
            os.close(self._fd)
            raise ClusterError(
                f"run {run_dir}: {holder} is working on it", hint="wait for it, or stop it and resume then"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Give the folder back; the lock file stays."""
        os.close(self._fd)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def is_held(run_dir: Path) -> bool:
    """Whether a driver holds the run folder; nothing is written."""
    try:
        handle = os.open(run_dir / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
