"""The driver's memory: an append-only `journal.jsonl`, one fsynced line per fact.

A checkpoint counts only when a line here says so, with its sha256; a worker that goes on writing after the driver has
given it up (they do: notes in `cluster/README.md`) writes files that no line names. What is not in the journal did
not happen.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import ryot
from ryot.atomic import fsync
from ryot.errors import ClusterError
from ryot.mapping import Unchecked, formerly, read_mapping, to_mapping
from ryot.run.folder import RunFolder
from ryot.run.metrics import TrainMetrics

log = logging.getLogger(__name__)

SCHEMA = 1
R = TypeVar("R", bound="Record")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What all lines carry."""

    record: ClassVar[str]
    key: str = ""
    """The training (or the stage's subject) that it is about."""
    time: float = field(default_factory=lambda: round(time.time(), 3))
    """Seconds since the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened(Record):
    """A driver has taken the run."""

    record: ClassVar[str] = "opened"
    schema: int = SCHEMA
    version: str = ryot.__version__
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageDone(Record):
    """A stage is done for inputs of this digest."""

    record: ClassVar[str] = "stage"
    stage: str
    digest: str
    outputs: Unchecked


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptBegun(Record):
    """Workers were asked to train, or to export a model."""

    record: ClassVar[str] = "attempt"
    digest: str
    attempt: int
    node: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointAccepted(Record):
    """A checkpoint counts."""

    record: ClassVar[str] = "checkpoint"
    digest: str
    attempt: int
    step: int
    path: str
    """Relative to the run folder."""
    sha256: str
    metrics: TrainMetrics = field(default_factory=TrainMetrics, metadata=formerly("facts"))
    """What is known about the training at this point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRejected(Record):
    """An accepted checkpoint counts no more: its files have changed since, or are gone."""

    record: ClassVar[str] = "rejected"
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingDone(Record):
    """A training has spent its budget."""

    record: ClassVar[str] = "done"
    digest: str
    path: str
    """Its last checkpoint, relative to the run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFailed(Record):
    """A training, or the export of a model, was given up."""

    record: ClassVar[str] = "failed"
    digest: str
    reason: str
    final: bool
    """Whether it would happen again, so that a resumed run does not try."""


_TYPES: dict[str, type[Record]] = {
    cls.record: cls
    for cls in (Opened, StageDone, AttemptBegun, CheckpointAccepted, CheckpointRejected, TrainingDone, TrainingFailed)
}


def parse_journal(path: Path) -> tuple[list[Record], int]:
    """The records of a journal, and the bytes up to a last line that was cut short.

    Kinds that this version does not know are passed over. Raises `ClusterError` for a line damaged elsewhere and for a
    newer schema.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].split(b"\n")[:-1]
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            schema = values.get("schema", SCHEMA)
            if schema > SCHEMA:
                raise ClusterError(f"{path}: schema {schema}, expected at most {SCHEMA}", hint="use a newer ryot")
            if values.get("record") in _TYPES:
                records.append(read_mapping(_TYPES[values["record"]], values))
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                return records, whole - len(line) - 1
            raise ClusterError(
                f"{path}: line {number} is not a journal record ({error})",
                hint="the file was changed by hand or by the disk; start a new run",
            ) from error
    return records, whole


class Journal:
    """The journal of one run folder; open it only while holding the folder's `RunLock`."""

    def __init__(self, folder: RunFolder):
        self.path = folder.journal
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ClusterError(f"run {folder}: {self.path.name} cannot be written ({error.strerror})") from error
        self._lock = threading.Lock()
        self.records, whole = parse_journal(self.path)
        if whole < os.fstat(self._fd).st_size:
            # Never acknowledged to anyone: the driver, or the power, went while it was written.
            log.warning("%s: the last line was cut short by a crash and is dropped", self.path)
            os.ftruncate(self._fd, whole)
            os.fsync(self._fd)
        self._by_key: dict[str, list[Record]] = defaultdict(list)
        for record in self.records:
            self._by_key[record.key].append(record)
        fsync(folder.path)

    def append(self, record: Record) -> None:
        """Write one fact; it is on disk when this returns. Threads may call it at once.

        Raises `ClusterError` when it cannot be written (a full disk).
        """
        line = json.dumps({"record": record.record, **to_mapping(record)}).encode() + b"\n"
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
            self.records.append(record)
            self._by_key[record.key].append(record)

    def open_run(self) -> None:
        """Say that a driver has taken the run. Raises `ClusterError` for a run of another ryot version."""
        for record in self.records:
            if isinstance(record, Opened) and record.version != ryot.__version__:
                raise ClusterError(
                    f"run {self.path.parent}: made by ryot {record.version}, this is {ryot.__version__}",
                    hint="resume with that version, or start a new run",
                )
        self.append(Opened())

    def finish_stage(self, stage: str, key: str, digest: str, **outputs: object) -> None:
        """Say that a stage is done for inputs of this digest; `outputs` is what `find_stage` gives back."""
        self.append(StageDone(stage=stage, key=key, digest=digest, outputs=outputs))

    def find_stage(self, stage: str, key: str, digest: str) -> Unchecked | None:
        """The outputs of a stage that was done with these inputs, or None; its files may be gone."""
        for record in reversed(self._of(StageDone, key)):
            if record.stage == stage:
                return record.outputs if record.digest == digest else None
        return None

    def next_attempt(self, key: str) -> int:
        """The number of the next attempt at a training; no number is used twice, whatever the inputs."""
        return 1 + max((r.attempt for r in self._of(AttemptBegun, key)), default=0)

    def accepted(self, key: str, digest: str) -> list[CheckpointAccepted]:
        """The accepted checkpoints of a training with these inputs, newest first, without rejected ones."""
        rejected = {r.path for r in self._of(CheckpointRejected, key)}
        found = [r for r in self._of(CheckpointAccepted, key) if r.digest == digest and r.path not in rejected]
        return found[::-1]

    def outcome(self, key: str, digest: str) -> TrainingDone | TrainingFailed | None:
        """How a training with these inputs has ended, if it has."""
        for record in reversed(self._by_key[key]):
            if isinstance(record, (TrainingDone, TrainingFailed)) and record.digest == digest:
                return record
        return None

    def has_ended(self, key: str, digest: str) -> bool:
        """Whether a training with these inputs is done, or has failed for good."""
        record = self.outcome(key, digest)
        return isinstance(record, TrainingDone) or (isinstance(record, TrainingFailed) and record.final)

    def _of(self, kind: type[R], key: str) -> list[R]:
        return [r for r in self._by_key[key] if isinstance(r, kind)]

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
