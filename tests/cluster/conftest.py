"""What the cluster tests share: planned trainings, what a run left, processes that are still there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ryot.cluster import reaper
from ryot.cluster.driver import train_variants
from ryot.cluster.options import ClusterOptions, DriverOptions
from ryot.cluster.runtime import Cluster, open_cluster
from ryot.config import KernelPlan
from ryot.events import Event
from ryot.run.folder import RunFolder
from ryot.run.journal import Journal
from ryot.run.lock import RunLock
from ryot.run.training import Training, TrainResult, plan_training
from ryot.train.dataset import Dataset
from ryot.train.loop import Trainer
from tests.conftest import tiny_variant

PROGRAM = Path(__file__).with_name("train_program.py")

#: Chunks short enough that a training of a second or two has several of them, each with a checkpoint.
SHORT = DriverOptions(chunk_s=0.02, checkpoint_every_s=0.0, backoff_s=0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One embedded Ray for the tests of a module."""
    with open_cluster(ClusterOptions(), log_dir=tmp_path_factory.mktemp("logs")) as opened:
        yield opened


def planned(
    dataset: Dataset, name: str = "optimized", *, steps: int = 60, seed: int = 0, workers: int = 1, **train: object
) -> Training:
    """A small training; `name` is one of the packaged recipes."""
    variant = tiny_variant(name, steps=steps, **train)
    return plan_training(variant, seed, dataset.path, KernelPlan(), workers=workers)


def plan_both(dataset: Dataset, steps: int) -> list[Training]:
    """The trainings of `train_program.py`."""
    return [planned(dataset, name, steps=steps) for name in ("baseline", "optimized")]


def learned_alone(trainings: list[Training], folder: Path) -> dict[str, str]:
    """What each variant learns when nothing disturbs it, computed in this process without any of the driver."""
    found = {}
    for training in trainings:
        trainer = Trainer(training, training.kernels)
        trainer.run_chunk(3600)
        trainer.save(folder / training.key)
        found[training.variant.name] = learned(folder / training.key)
    return found


def train(
    run_dir: Path,
    trainings: list[Training],
    cluster: Cluster,
    *,
    options: DriverOptions = SHORT,
    emit=lambda event: None,
    on_done=None,
) -> list[TrainResult]:
    """One driver's work on a run folder: lock, journal, trainings."""
    run_dir.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(run_dir)
    with RunLock(folder):
        journal = Journal(folder)
        try:
            journal.open_run()
            return train_variants(
                trainings, cluster=cluster, folder=folder, journal=journal, emit=emit, options=options, on_done=on_done
            )
        finally:
            journal.close()


class Recorder:
    """Keeps the events of a training, and does something once when one of them is of a kind."""

    def __init__(self, kind: str = "", action=None, after: int = 1):
        self.events: list[Event] = []
        self._kind, self._action, self._after = kind, action, after

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self._action and event.kind == self._kind:
            self._after -= 1
            if self._after == 0:
                self._action()

    def details(self, status: str) -> list[str]:
        """The details of the stage events of one status."""
        return [e.detail for e in self.events if e.kind == "stage" and e.status == status]


def learned(checkpoint: Path | None) -> str:
    """Digest of what a training learned: weights, optimizer and random state, without its clock times."""
    assert checkpoint is not None
    digest = hashlib.sha256()
    for name in ("model.safetensors", "training/state.safetensors"):
        digest.update((checkpoint / name).read_bytes())
    return digest.hexdigest()


def records(run_dir: Path, kind: str) -> list[dict]:
    """The journal's records of one kind."""
    lines = (run_dir / "journal.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["record"] == kind]


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes of the embedded cluster in `folder`."""
    return [psutil.Process(pid) for pid in reaper.find_marked(folder)]


def workers_of(folder: Path) -> list[int]:
    """Ids of the actors that train in the cluster in `folder`."""
    return [p.pid for p in processes_of(folder) if "TrainWorker" in " ".join(p.cmdline())]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files of this test alone: other tests, and people, have clusters on this machine too."""
    with tempfile.TemporaryDirectory(prefix="c", dir="/tmp") as folder:  # Ray's sockets want a short path
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def cluster_folders() -> set[Path]:
    """The folders of all embedded clusters below the folder for temporary files."""
    return set(Path(tempfile.gettempdir()).glob(f"{reaper.PREFIX}*"))


@contextmanager
def train_program(run_dir: Path, dataset: Dataset, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`train_program.py` in a process of its own; it says each event on stdout."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(run_dir), str(dataset.path), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def wait_for_event(process: subprocess.Popen[str], kind: str, count: int = 1) -> dict:
    """Read the program's events until `count` of a kind have come; returns the last."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["kind"] == kind:
            count -= 1
            if count == 0:
                return event
    _, said = process.communicate()
    raise AssertionError(f"the program ended before its {kind} event: {said[-2000:]}")
