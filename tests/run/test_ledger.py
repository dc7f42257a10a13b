"""What becomes of trainings, without workers: checkpoints, failures and ends as a driver reports them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ryot.config import KernelPlan
from ryot.errors import ClusterError, TrainingError
from ryot.events import CheckpointEvent, Event, GateEvent, StageEvent
from ryot.run.folder import RunFolder
from ryot.run.journal import Journal, TrainingFailed
from ryot.run.ledger import Ledger, TrainingState
from ryot.run.metrics import TrainMetrics
from ryot.run.store import CheckpointStore
from ryot.run.training import Training, TrainResult, plan_training
from ryot.train.checkpoint import checkpoint_digest
from ryot.train.dataset import Dataset
from ryot.train.gates import GateBreach
from tests.conftest import tiny_variant


class Desk:
    """A ledger over a run folder, what it said, and a checkpoint that workers could have written."""

    def __init__(self, path: Path, training: Training, checkpoint: Path):
        self.folder, self.training, self.checkpoint = RunFolder(path), training, checkpoint
        self.events: list[Event] = []
        self.results: list[TrainResult] = []
        self.journal = Journal(self.folder)
        self.ledger = Ledger(
            [training],
            journal=self.journal,
            store=CheckpointStore(self.folder, self.journal, keep=2, reread=True),
            emit=self.events.append,
            on_done=self.results.append,
            max_failures=2,
            backoff_s=0.5,
        )
        self.ledger.recall()

    @property
    def state(self) -> TrainingState:
        return self.ledger.states[0]

    def begin(self) -> Path:
        return self.ledger.begin(self.state, "here")

    def write(self, folder: Path, step: int) -> None:
        path = Path(shutil.copytree(self.checkpoint, folder / f"step-{step:08d}"))
        self.ledger.accept(self.state, step=step, path=path, sha256=checkpoint_digest(path))

    def statuses(self) -> list[str]:
        return [e.status for e in self.events if isinstance(e, StageEvent)]


@pytest.fixture
def training(dataset: Dataset) -> Training:
    return plan_training(tiny_variant("optimized"), 0, dataset.path, KernelPlan())


@pytest.fixture
def desk(training: Training, trained: Path, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path, training, trained)
    yield desk
    desk.journal.close()


def test_a_new_training_waits_begins_and_ends_with_its_last_checkpoint(desk: Desk) -> None:
    assert desk.ledger.waiting == [desk.state]
    folder = desk.begin()
    assert folder == desk.folder.attempt("optimized", 0, 1) and desk.ledger.waiting == []
    desk.state.metrics = TrainMetrics(tokens=128, val_loss=3.5)
    for step in (4, 8, 12):
        desk.write(folder, step)
    desk.ledger.finish(desk.state)
    [result] = desk.results
    assert (result.step, result.attempts, result.error, result.metrics.val_loss) == (12, 1, None, 3.5)
    assert [e.step for e in desk.events if isinstance(e, CheckpointEvent)] == [4, 8, 12]
    # Two are kept, as asked for.
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000008", "step-00000012"]


def test_a_failed_worker_is_followed_by_an_attempt_from_the_last_checkpoint_later_each_time(desk: Desk) -> None:
    desk.write(desk.begin(), 4)
    for failure, wait_s in ((1, 0.5), (2, 1.0)):
        desk.ledger.retry(desk.state, TimeoutError("no report"), "node-1")
        assert desk.state.failures == failure and desk.ledger.waiting == [desk.state]
        assert desk.state.not_before - time.monotonic() == pytest.approx(wait_s, abs=0.2)
        assert desk.begin() == desk.folder.attempt("optimized", 0, 1 + failure)
        assert desk.state.newest is not None and desk.state.newest.step == 4
    assert desk.statuses()[-1] == "lost"
    desk.write(desk.folder.attempt("optimized", 0, 3), 8)
    assert desk.state.failures == 0


def test_too_many_failures_in_a_row_end_it_and_a_resumed_run_tries_again(desk: Desk, trained: Path) -> None:
    for _ in range(3):
        desk.begin()
        desk.ledger.retry(desk.state, ClusterError("gone"), "node-1")
    assert desk.ledger.waiting == [] and "3 workers failed in a row; the last: gone" in str(desk.results[0].error)
    [failed] = [r for r in desk.journal.records if isinstance(r, TrainingFailed)]
    assert not failed.final
    assert Desk(desk.folder.path, desk.training, trained).ledger.waiting


def test_a_breached_gate_is_said_and_final(desk: Desk, trained: Path) -> None:
    desk.begin()
    desk.ledger.breach(desk.state, GateBreach("loss", "loss", 3, float("nan"), 10.0))
    [gate] = [e for e in desk.events if isinstance(e, GateEvent)]
    assert (gate.gate, gate.value, gate.limit) == ("loss", None, 10.0)
    again = Desk(desk.folder.path, desk.training, trained)
    assert again.ledger.waiting == []
    assert isinstance(again.results[0].error, TrainingError) and again.results[0].cached


def test_a_finished_training_is_recalled_and_a_changed_checkpoint_of_it_is_not(desk: Desk, trained: Path) -> None:
    folder = desk.begin()
    desk.write(folder, 4)
    desk.write(folder, 12)
    desk.ledger.finish(desk.state)
    again = Desk(desk.folder.path, desk.training, trained)
    assert again.statuses() == ["cached"] and again.results[0].step == 12
    (folder / "step-00000012" / "model.safetensors").write_bytes(b"")
    damaged = Desk(desk.folder.path, desk.training, trained)
    assert damaged.statuses() == ["rejected"]
    assert damaged.ledger.waiting == [damaged.state]
    assert damaged.state.newest is not None and damaged.state.newest.step == 4


def test_a_checkpoint_that_is_not_what_the_worker_wrote_counts_for_nothing(desk: Desk) -> None:
    path = Path(shutil.copytree(desk.checkpoint, desk.begin() / "step-00000004"))
    with pytest.raises(ClusterError, match="it is not what the driver reads there"):
        desk.ledger.accept(desk.state, step=4, path=path, sha256="0" * 64)
    assert desk.journal.accepted(desk.training.key, desk.training.digest) == []
