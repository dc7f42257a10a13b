"""Run folders, looked at from outside: which there are, how far they are, and removing one."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ryot.errors import ClusterError, ConfigError
from ryot.mapping import to_mapping
from ryot.run.folder import RunFolder, resume_hint
from ryot.run.journal import (
    AttemptBegun,
    CheckpointAccepted,
    Opened,
    Record,
    StageDone,
    TrainingDone,
    TrainingFailed,
    parse_journal,
)
from ryot.run.lock import RunLock, is_held


@dataclass(frozen=True, slots=True)
class TrainingState:
    """One training of a run."""

    key: str
    state: str
    """`done`, `failed` or `begun`; a model that was imported is done when it is exported."""
    step: int
    """Of the newest accepted checkpoint."""
    attempts: int
    val_loss: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run folder says about itself."""

    path: Path
    state: str
    """`running`, `finished` or `stopped`, which can be resumed; or `damaged`, for what `problem` says."""
    begun_at: float
    """Seconds since the epoch."""
    version: str
    size_bytes: int
    trainings: tuple[TrainingState, ...]
    problem: str = ""


def find_runs(root: Path) -> list[RunFolder]:
    """The runs directly in `root`, oldest first."""
    if not root.is_dir():
        return []
    folders = [RunFolder(path) for path in root.iterdir()]
    return sorted((f for f in folders if f.is_run), key=lambda f: f.journal.stat().st_ctime)


def read_run(path: Path) -> RunState:
    """The state of a run; it may be running. Raises `ConfigError` when the folder is no run's."""
    folder = RunFolder(path)
    if not folder.is_run:
        raise ConfigError(f"run {path}: is not a run folder (no {folder.journal.name})")
    records, _ = parse_journal(folder.journal)
    keys = dict.fromkeys(r.key for r in records if isinstance(r, AttemptBegun))
    opened = next((r for r in records if isinstance(r, Opened)), None)
    if is_held(folder):
        state = "running"
    else:
        state = "finished" if folder.report.exists() else "stopped"
    return RunState(
        path=path,
        state=state,
        begun_at=opened.time if opened else 0.0,
        version=opened.version if opened else "?",
        size_bytes=_size(path),
        trainings=tuple(_training_state(key, [r for r in records if r.key == key]) for key in keys),
    )


def _training_state(key: str, records: list[Record]) -> TrainingState:
    newest = next((r for r in reversed(records) if isinstance(r, CheckpointAccepted)), None)
    end = next((r for r in reversed(records) if isinstance(r, (TrainingDone, TrainingFailed, StageDone))), None)
    return TrainingState(
        key=key,
        state="begun" if end is None else "done" if isinstance(end, StageDone) else end.record,
        step=newest.step if newest else 0,
        attempts=sum(isinstance(r, AttemptBegun) for r in records),
        val_loss=newest.metrics.val_loss if newest else None,
        reason=end.reason if isinstance(end, TrainingFailed) else "",
    )


def list_runs(root: Path) -> list[RunState]:
    """The state of every run in `root`; one that cannot be read hides no other."""
    states = []
    for folder in find_runs(root):
        try:
            states.append(read_run(folder.path))
        except ClusterError as error:
            begun_at = folder.journal.stat().st_ctime
            states.append(RunState(folder.path, "damaged", begun_at, "?", _size(folder.path), (), str(error)))
    return states


def _size(path: Path) -> int:
    size = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a running run removes old checkpoints meanwhile
            size += file.lstat().st_size if file.is_file() else 0
    return size


def remove_run(path: Path) -> int:
    """Remove a run folder; returns the bytes freed. Raises when it is running or no run's."""
    state, folder = read_run(path), RunFolder(path)
    lock = RunLock(folder)
    try:
        # Without its journal a folder half removed is no run any more.
        folder.journal.unlink()
        shutil.rmtree(path)
    except OSError as error:
        raise ClusterError(f"run {path}: cannot be removed ({error.strerror})") from error
    finally:
        lock.release()
    return state.size_bytes


def run_to_dict(state: RunState) -> dict[str, object]:
    """The state as plain values."""
    return {**to_mapping(state, keep_none=True), "path": str(state.path)}


def format_runs(states: list[RunState], fmt: str) -> str:
    """A line per run, or JSON."""
    if fmt == "json":
        return json.dumps({"schema": 1, "runs": [run_to_dict(s) for s in states]}, indent=1)
    from tabulate import tabulate

    rows = [
        [
            str(s.path),
            s.state,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(s.begun_at)),
            f"{sum(t.state == 'done' for t in s.trainings)} of {len(s.trainings)}",
            f"{s.size_bytes / 1e6:.1f} MB",
        ]
        for s in states
    ]
    table = tabulate(rows, headers=["run", "state", "begun", "trained", "size"], colalign=("left",) * 4 + ("right",))
    return "\n".join([table, *(s.problem for s in states if s.problem)])


def format_run(state: RunState, fmt: str) -> str:
    """A line per training, or JSON."""
    if fmt == "json":
        return json.dumps({"schema": 1, **run_to_dict(state)}, indent=1)
    from tabulate import tabulate

    rows = [
        [t.key, t.state, t.step, "" if t.val_loss is None else f"{t.val_loss:.3f}", t.attempts, t.reason]
        for t in state.trainings
    ]
    table = tabulate(rows, headers=["training", "state", "step", "val loss", "attempts", "reason"])
    resume = f"\n{resume_hint(state.path)}" if state.state == "stopped" else ""
    return f"{state.path}: {state.state}\n{table}{resume}"
