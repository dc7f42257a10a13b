"""Run folders, looked at from outside: which there are, how far they are, and removing one."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ryot.cluster.journal import FILE, RunLock, is_held, parse_journal
from ryot.errors import ClusterError, ConfigError

REPORT = "report.json"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """One training of a run."""

    key: str
    state: str
    """`done`, `failed` or `begun`."""
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


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / FILE).is_file()


def find_runs(folder: Path) -> list[Path]:
    """The runs directly in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if is_run(p)), key=lambda p: (p / FILE).stat().st_ctime)


def read_run(path: Path) -> RunState:
    """The state of a run; it may be running. Raises `ConfigError` when the folder is no run's."""
    if not is_run(path):
        raise ConfigError(f"run {path}: is not a run folder (no {FILE})")
    records, _ = parse_journal(path / FILE)
    keys = list(dict.fromkeys(r["key"] for r in records if r["record"] == "attempt"))
    trainings = []
    for key in keys:
        mine = [r for r in records if r.get("key") == key]
        checkpoints = [r for r in mine if r["record"] == "checkpoint"]
        ends = [r for r in mine if r["record"] in ("done", "failed")]
        trainings.append(
            TrainingState(
                key=key,
                state=ends[-1]["record"] if ends else "begun",
                step=checkpoints[-1]["step"] if checkpoints else 0,
                attempts=sum(r["record"] == "attempt" for r in mine),
                val_loss=checkpoints[-1]["facts"].get("val_loss") if checkpoints else None,
                reason=ends[-1].get("reason", "") if ends else "",
            )
        )
    opened: dict[str, Any] = next((r for r in records if r["record"] == "opened"), {"time": 0.0, "version": "?"})
    if is_held(path):
        state = "running"
    else:
        state = "finished" if (path / REPORT).exists() else "stopped"
    return RunState(
        path=path,
        state=state,
        begun_at=opened["time"],
        version=opened["version"],
        size_bytes=_size(path),
        trainings=tuple(trainings),
    )


def list_runs(folder: Path) -> list[RunState]:
    """The state of every run in `folder`; one that cannot be read hides no other."""
    states = []
    for path in find_runs(folder):
        try:
            states.append(read_run(path))
        except ClusterError as error:
            begun_at = (path / FILE).stat().st_ctime
            states.append(RunState(path, "damaged", begun_at, "?", _size(path), (), str(error)))
    return states


def _size(path: Path) -> int:
    size = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a running run removes old checkpoints meanwhile
            size += file.lstat().st_size if file.is_file() else 0
    return size


def remove_run(path: Path) -> int:
    """Remove a run folder; returns the bytes freed. Raises when it is running or no run's."""
    state = read_run(path)
    lock = RunLock(path)
    try:
        # Without its journal a folder half removed is no run any more.
        (path / FILE).unlink()
        shutil.rmtree(path)
    except OSError as error:
        raise ClusterError(f"run {path}: cannot be removed ({error.strerror})") from error
    finally:
        lock.release()
    return state.size_bytes


def run_to_dict(state: RunState) -> dict[str, object]:
    """The state as plain values."""
    return {
        "path": str(state.path),
        "state": state.state,
        "begun_at": state.begun_at,
        "version": state.version,
        "size_bytes": state.size_bytes,
        "problem": state.problem,
        "trainings": [
            {
                "key": t.key,
                "state": t.state,
                "step": t.step,
                "attempts": t.attempts,
                "val_loss": t.val_loss,
                "reason": t.reason,
            }
            for t in state.trainings
        ],
    }


def format_runs(states: list[RunState], fmt: str) -> str:
    """A line a run, or JSON."""
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
    """A line a training, or JSON."""
    if fmt == "json":
        return json.dumps({"schema": 1, **run_to_dict(state)}, indent=1)
    from tabulate import tabulate

    rows = [
        [t.key, t.state, t.step, "" if t.val_loss is None else f"{t.val_loss:.3f}", t.attempts, t.reason]
        for t in state.trainings
    ]
    table = tabulate(rows, headers=["training", "state", "step", "val loss", "attempts", "reason"])
    way_on = f"\ngo on with: ryot-deploy cluster-run --resume {state.path}" if state.state == "stopped" else ""
    return f"{state.path}: {state.state}\n{table}{way_on}"
