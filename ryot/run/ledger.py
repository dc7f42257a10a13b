"""What becomes of each training of a run, whatever computes it: recalled, begun, accepted, failed, ended.

    waiting --begin--> at work --accept--> ... --finish--> ended
       ^                  |
       +---- retry -------+---- fail ----------------------> ended

A checkpoint counts once the journal says so. After a failure of its worker a training goes on from the last one that
does, in a new attempt with a folder of its own. It knows nothing of workers: `ryot.cluster.driver` does.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ryot.errors import ClusterError, RyotError, TrainingError
from ryot.events import CheckpointEvent, Event, GateEvent, StageEvent, StageStatus
from ryot.run.journal import AttemptBegun, CheckpointAccepted, Journal, TrainingDone, TrainingFailed
from ryot.run.metrics import TrainMetrics
from ryot.run.store import CheckpointStore
from ryot.run.training import OnDone, Training, TrainResult
from ryot.train.gates import GateBreach

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 30.0


@dataclass(slots=True, eq=False)
class TrainingState:
    """A training on its way."""

    training: Training
    attempts: int = 0
    failures: int = 0
    """Of its workers in a row, without a checkpoint accepted in between."""
    not_before: float = 0.0
    """When it may be tried again, by the monotonic clock."""
    accepted: list[CheckpointAccepted] = field(default_factory=list)
    """Newest first."""
    metrics: TrainMetrics = field(default_factory=TrainMetrics)
    attempt: int = 0
    """Number of the attempt in progress, or of the last one."""
    wall_begin: float = 0.0
    result: TrainResult | None = None

    @property
    def newest(self) -> CheckpointAccepted | None:
        """The checkpoint that it goes on from."""
        return self.accepted[0] if self.accepted else None


class Ledger:
    """The states of all trainings of a run; `on_done` is told each result as it is known."""

    def __init__(
        self,
        trainings: Sequence[Training],
        *,
        journal: Journal,
        store: CheckpointStore,
        emit: Callable[[Event], None],
        on_done: OnDone = lambda result: None,
        max_failures: int,
        backoff_s: float,
    ):
        self.journal, self.store, self.emit, self.on_done = journal, store, emit, on_done
        self.states = [TrainingState(t) for t in trainings]
        self.waiting: list[TrainingState] = []
        self._max_failures, self._backoff_s = max_failures, backoff_s

    @property
    def results(self) -> list[TrainResult]:
        """Those that are known, in the order of the trainings."""
        return [s.result for s in self.states if s.result]

    def recall(self) -> None:
        """Take up what the journal says about each training: ended, begun or new."""
        for state in self.states:
            self._load_accepted(state)
            outcome = self.journal.outcome(state.training.key, state.training.digest)
            if isinstance(outcome, TrainingFailed) and outcome.final:
                self._finish(state, error=TrainingError(outcome.reason), cached=True)
            elif isinstance(outcome, TrainingDone) and state.newest and state.newest.path == outcome.path:
                self._finish(state, cached=True)
            else:
                self.waiting.append(state)

    def begin(self, state: TrainingState, where: str) -> Path:
        """A new attempt at a training that waits, on nodes named `where`; returns the folder it writes to."""
        training = state.training
        self.waiting.remove(state)
        state.attempt = self.journal.next_attempt(training.key)
        state.attempts += 1
        state.wall_begin = state.wall_begin or time.monotonic()
        self.journal.append(AttemptBegun(key=training.key, digest=training.digest, attempt=state.attempt, node=where))
        self.store.prune(training, state.accepted, state.attempt)
        return self.store.attempt_folder(training, state.attempt)

    def accept(self, state: TrainingState, *, step: int, path: Path, sha256: str) -> None:
        """Make a checkpoint of the attempt in progress count. Raises `ClusterError` when it cannot be trusted."""
        accepted = self.store.accept(
            state.training, state.attempt, step=step, path=path, sha256=sha256, metrics=state.metrics
        )
        state.accepted.insert(0, accepted)
        state.failures = 0
        job = state.training
        self.emit(
            CheckpointEvent(
                variant=job.variant.name, seed=job.seed, step=step, path=accepted.path, sha256=accepted.sha256
            )
        )
        self.store.prune(job, state.accepted, state.attempt)

    def finish(self, state: TrainingState) -> None:
        """Its budget is spent, and its last checkpoint counts."""
        training, newest = state.training, state.newest
        assert newest is not None
        self.journal.append(TrainingDone(key=training.key, digest=training.digest, path=newest.path))
        self._finish(state)

    def breach(self, state: TrainingState, breach: GateBreach) -> None:
        """A safety gate stopped it; it would do so again."""
        job, value = state.training, breach.value if math.isfinite(breach.value) else None
        self.emit(
            GateEvent(
                variant=job.variant.name,
                seed=job.seed,
                gate=breach.gate,
                passed=False,
                value=value,
                limit=breach.limit,
            )
        )
        self.fail(state, breach, final=True)

    def fail(self, state: TrainingState, error: RyotError, *, final: bool) -> None:
        """End a training; the others go on. A `final` failure would happen again: resuming does not try it."""
        training = state.training
        log.info("%s failed: %s", training.key, error)
        self.journal.append(TrainingFailed(key=training.key, digest=training.digest, reason=str(error), final=final))
        self._finish(state, error=error)

    def retry(self, state: TrainingState, error: BaseException, where: str) -> None:
        """A worker is gone: the training waits to go on from its last accepted checkpoint, later each time."""
        state.failures += 1
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if state.failures > self._max_failures:
            reason = f"{state.training.key}: {state.failures} workers failed in a row; the last: {reason}"
            self.fail(state, ClusterError(reason, hint="resume the run when the cluster is well again"), final=False)
            return
        wait_s = min(MAX_BACKOFF_S, self._backoff_s * 2 ** (state.failures - 1))
        state.not_before = time.monotonic() + wait_s
        self._load_accepted(state)
        step = state.newest.step if state.newest else 0
        log.info("%s: its worker on %s failed: %r", state.training.key, where, error.__cause__ or error)
        self.tell(state, "lost", f"{reason} on {where}; again from step {step} in {wait_s:g} s")
        self.waiting.append(state)

    def tell(self, state: TrainingState, status: StageStatus, detail: str = "", wall_s: float | None = None) -> None:
        """Say what has happened to a training."""
        job = state.training
        self.emit(
            StageEvent(
                stage="train",
                variant=job.variant.name,
                seed=job.seed,
                status=status,
                attempt=state.attempt or None,
                wall_s=wall_s,
                detail=detail,
            )
        )

    def _load_accepted(self, state: TrainingState) -> None:
        state.accepted, problems = self.store.find_whole(state.training)
        state.metrics = state.newest.metrics if state.newest else TrainMetrics()
        for problem in problems:
            self.tell(state, "rejected", problem)

    def _finish(self, state: TrainingState, error: RyotError | None = None, cached: bool = False) -> None:
        job, newest = state.training, state.newest
        state.result = TrainResult(
            variant=job.variant.name,
            seed=job.seed,
            checkpoint=self.store.folder.path / newest.path if newest else None,
            sha256=newest.sha256 if newest else "",
            step=newest.step if newest else 0,
            attempts=state.attempts,
            metrics=state.metrics,
            cached=cached,
            error=error,
        )
        wall_s = time.monotonic() - state.wall_begin if state.wall_begin else 0.0
        status: StageStatus = "failed" if error else "cached" if cached else "end"
        self.tell(state, status, str(error or ""), wall_s)
        self.on_done(state.result)
