"""The scheduler of trainings: many variants and seeds on whatever cores there are, losing nothing to what dies.

    waiting --room on a node--> starting --trainer built--> training --last checkpoint accepted--> done
       ^                                                        |
       +------- worker, node or link lost: back-off ------------+--- safety gate, bug, too many losses --> failed

Each worker is asked for one slice of a few seconds at a time. A checkpoint that comes with a slice's report counts
once the journal says so; after a loss the training goes on from the last one that does, in a new attempt with a
folder of its own. Reports of an attempt that was given up are never looked at again.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ryot.cluster.callbacks import CallbackThread
from ryot.cluster.folders import pack_folder
from ryot.cluster.jobs import DriverOptions, OnDone, PlannedJob, TrainResult, merge_facts
from ryot.cluster.journal import Accepted, Journal
from ryot.cluster.lanes import Lane, WorkerFailed, WorkerLost
from ryot.cluster.placement import Placement
from ryot.cluster.probe import probe_nodes
from ryot.cluster.runtime import Cluster
from ryot.cluster.signals import StopSignals
from ryot.cluster.store import CheckpointStore
from ryot.cluster.worker import LOG_FILE, Assignment, SliceReport, Started
from ryot.errors import ClusterError, Interrupted, RyotError, TrainingError
from ryot.events import CheckpointEvent, Event, GateEvent, StageEvent, StageStatus
from ryot.train.gates import GateBreach
from ryot.train.parallel import Group

log = logging.getLogger(__name__)

#: How long the driver sleeps at most before it looks at signals and free cores again.
_TICK_S = 0.2

#: Taking in one report of a worker (`benchmarks/driver_limits.py`, 2026-11-24: 3.1 ms).
_REPORT_S = 0.003


@dataclass(slots=True)
class _Task:
    """A training on its way through the driver."""

    planned: PlannedJob
    attempts: int = 0
    losses: int = 0
    not_before: float = 0.0
    accepted: list[Accepted] = field(default_factory=list)
    """Newest first."""
    facts: dict[str, Any] = field(default_factory=dict)
    attempt: int = 0
    wall_begin: float = 0.0
    result: TrainResult | None = None


@dataclass(slots=True, eq=False)
class _Work:
    """A training and the actors that are at it."""

    task: _Task
    lane: Lane
    max_steps: int | None = None
    """Steps of the next slice; the ranks of a group must agree on them."""


class Driver:
    """Runs trainings to their end; `train_variants` is the way in."""

    def __init__(
        self,
        jobs: Sequence[PlannedJob],
        *,
        cluster: Cluster,
        run_dir: Path,
        journal: Journal,
        emit: Callable[[Event], None],
        options: DriverOptions,
        on_done: OnDone | None,
        signals: StopSignals,
    ):
        self.cluster, self.run_dir, self.journal = cluster, run_dir.absolute(), journal
        self.emit, self.options, self.signals = emit, options, signals
        self.store = CheckpointStore(self.run_dir, journal, keep=options.keep_checkpoints, reread=not cluster.embedded)
        self.tasks = [_Task(p) for p in jobs]
        self.waiting: list[_Task] = []
        self.works: list[_Work] = []
        self.placement = Placement(cluster)
        self.travels: set[Path] = set()
        """Folders that not every node sees: what is in them comes and goes as bytes."""
        self.stopping = ""
        """Why no further slices are asked for."""
        self._datasets: dict[Path, Any] = {}
        self._callbacks = CallbackThread(on_done) if on_done else None
        self._deadline = time.monotonic() + options.max_hours * 3600 if options.max_hours else None
        self._busy_at = time.monotonic()

    def run(self) -> list[TrainResult]:
        """Train all; one result a job, in their order. Raises `Interrupted` and `ClusterError`."""
        try:
            for task in self.tasks:
                self._recall(task)
            if self.waiting:
                self.cluster.open()
                self._look_at_cluster()
            while (self.waiting and not self.stopping) or self.works:
                self._heed_signals()
                if not self.cluster.is_whole():
                    self._restart_cluster()
                self._fill()
                self._wait()
                self._give_up_hung()
            if self._callbacks:
                self._callbacks.finish(lambda: self.signals.stop_at_once)
                self._heed_signals()
        finally:
            for work in list(self.works):
                self._close(work, kill=True)
            if self._callbacks:
                # Whatever ends the run, no export goes on writing behind it.
                self._callbacks.leave(lambda: self.signals.stop_at_once)
        if self.stopping:
            raise Interrupted(f"{self.stopping}; what was accepted so far is in {self.run_dir}")
        return [t.result for t in self.tasks if t.result]

    def _heed_signals(self) -> None:
        if self.signals.stop_at_once:
            raise Interrupted(f"stopped at once; what was accepted so far is in {self.run_dir}")
        if self.stopping:
            return
        if self.signals.stop:
            self.stopping = "stopped by a signal"
        elif self._deadline is not None and time.monotonic() > self._deadline:
            self.stopping = "the time limit was reached"
        if self.stopping:
            for work in [w for w in self.works if w.lane.doing == "start"]:
                self._close(work, kill=True)

    def _wait(self) -> None:
        import ray

        refs = [ref for work in self.works for ref in work.lane.refs]
        if not refs:
            time.sleep(_TICK_S)
            return
        ready, _ = ray.wait(refs, num_returns=1, timeout=_TICK_S)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for work in list(self.works):
            self._collect(work, set(ready))

    def _restart_cluster(self) -> None:
        """The embedded Ray has lost its control process or node manager: start another, and all trainings again."""
        error = ClusterError("Ray itself died")
        for work in list(self.works):
            self._lose(work, error)
        log.warning("%s: it is started again", error)
        self.cluster.restart()
        self.placement = Placement(self.cluster)
        self._datasets.clear()

    # What is known from before

    def _recall(self, task: _Task) -> None:
        """Take up what the journal says about a training: ended, begun or new."""
        self._load_accepted(task)
        outcome = self.journal.outcome(task.planned.key, task.planned.digest)
        if outcome and outcome["record"] == "failed" and outcome["final"]:
            self._finish(task, error=TrainingError(outcome["reason"]), cached=True)
        elif outcome and outcome["record"] == "done" and task.accepted and task.accepted[0].path == outcome["path"]:
            self._finish(task, cached=True)
        else:
            self.waiting.append(task)

    def _load_accepted(self, task: _Task) -> None:
        task.accepted, problems = self.store.find_whole(task.planned)
        task.facts = dict(task.accepted[0].facts) if task.accepted else {}
        for problem in problems:
            self._tell(task, "rejected", problem)

    def _look_at_cluster(self) -> None:
        """Refuse what can't be run, and find out what the nodes see."""
        for need, workers in {(t.planned.need, t.planned.workers) for t in self.waiting}:
            self.placement.check_fits(need, workers, "training")
        if self.cluster.embedded:
            return
        datasets = {Path(t.planned.job.dataset_dir) for t in self.waiting}
        facts = probe_nodes(self.cluster, [self.run_dir, *datasets])
        self.placement.only(set(facts))
        self.travels = {
            path for path in (self.run_dir, *datasets) if not all(f.seen.get(str(path), False) for f in facts.values())
        }
        if self.run_dir in self.travels:
            log.info("nodes do not see %s: checkpoints travel through the driver", self.run_dir)

    # Starting

    def _fill(self) -> None:
        """Give each free core to the longest waiting training; `ClusterError` when none was free for long."""
        now = time.monotonic()
        if self.works or not self.waiting:
            self._busy_at = now
        elif now - self._busy_at > self.options.cores_timeout_s:
            raise ClusterError(
                f"no node has had room for {self.waiting[0].planned.key} for {self.options.cores_timeout_s:g} s",
                hint="resume the run when the cluster has free CPUs again",
            )
        if not self.waiting or self.stopping:
            return
        self.waiting.sort(key=lambda t: -t.planned.cost)
        self.placement.look()
        for task in list(self.waiting):
            if task.not_before > now:
                continue
            nodes = self.placement.take(task.planned.need, task.planned.workers)
            if not nodes:
                continue
            self.waiting.remove(task)
            work = _Work(task, Lane(nodes, task.planned.need))
            self.works.append(work)
            self._assign(work, task)

    def _assign(self, work: _Work, task: _Task) -> None:
        planned = task.planned
        task.attempt = self.journal.next_attempt(planned.key)
        task.attempts += 1
        task.wall_begin = task.wall_begin or time.monotonic()
        newest = task.accepted[0] if task.accepted else None
        self.journal.append(
            "attempt", key=planned.key, digest=planned.digest, attempt=task.attempt, node=work.lane.where
        )
        self.store.prune(planned, task.accepted, task.attempt)
        folder = self.store.attempt_folder(planned, task.attempt)
        assignment = Assignment(
            job=planned.job,
            plan=planned.plan,
            folder=str(folder),
            resume=str(self.run_dir / newest.path) if newest else None,
            travels=self.run_dir in self.travels,
        )
        dataset_dir = Path(planned.job.dataset_dir)
        dataset = self._packed_dataset(dataset_dir) if dataset_dir in self.travels else None
        checkpoint = pack_folder(self.run_dir / newest.path) if assignment.travels and newest else None
        work.task = task
        work.max_steps = None if planned.workers == 1 else 1
        groups: list[Group | None] = [None]
        if planned.workers > 1:
            meet = self._choose_rendezvous(work.lane, folder)
            groups = [Group(rank=rank, size=planned.workers, rendezvous=meet) for rank in range(planned.workers)]
        work.lane.call("start", "start", *[(assignment, group, dataset, checkpoint) for group in groups])

    def _choose_rendezvous(self, lane: Lane, folder: Path) -> str:
        """A place where the ranks of this attempt, and no stale one, meet."""
        if self.run_dir not in self.travels:
            folder.mkdir(parents=True, exist_ok=True)
            return f"file://{folder}/group"
        # Whether the port is free shows when rank 0 listens; if not, the attempt is lost and the next has another.
        return f"tcp://{lane.nodes[0].ip}:{random.randrange(20_000, 32_000)}"

    def _packed_dataset(self, dataset_dir: Path) -> Any:
        import ray

        if dataset_dir not in self._datasets:
            self._datasets[dataset_dir] = ray.put(pack_folder(dataset_dir))
        return self._datasets[dataset_dir]

    # Collecting

    def _collect(self, work: _Work, ready: set[Any]) -> None:
        """Take in what the workers of a training say, and ask for what comes next."""
        try:
            answer = work.lane.collect(ready)
        except WorkerFailed as error:
            self._on_exception(work, error.cause)
        except WorkerLost as error:
            self._lose(work, error)
        else:
            if isinstance(answer, Started):
                self._on_started(work, answer)
            elif isinstance(answer, SliceReport):
                self._on_report(work, answer)

    def _on_exception(self, work: _Work, cause: BaseException) -> None:
        if isinstance(cause, RyotError) and work.lane.doing == "start":
            # The folder was whole when the driver looked: a path that the worker cannot see, or not now.
            self._lose(work, cause)
            return
        where = self.store.attempt_folder(work.task.planned, work.task.attempt) / LOG_FILE
        reason = str(cause) if isinstance(cause, RyotError) else f"{type(cause).__name__}: {cause}"
        error = TrainingError(f"{work.task.planned.key}: {reason}", hint=f"its worker's log: {where}")
        self._fail(work, error, final=False)

    def _on_started(self, work: _Work, started: Started) -> None:
        cores = f"cores {','.join(map(str, started.cores))}" if started.cores else "not pinned"
        ranks = f"{len(work.lane.nodes)} ranks, " if len(work.lane.nodes) > 1 else ""
        where = f"step {started.step} on {work.lane.where}, {ranks}{cores}, attempt {work.task.attempt}"
        self._tell(work.task, "begin", where)
        self._next_slice(work)

    def _next_slice(self, work: _Work) -> None:
        # With very many workers longer slices, so that taking in their reports stays a quarter of the driver's time.
        slice_s = max(self.options.slice_s, 4 * _REPORT_S * len(self.works))
        if work.max_steps is not None:
            if work.lane.doing == "slice":
                fitting = work.max_steps * slice_s / max(time.monotonic() - work.lane.since, 1e-3)
                work.max_steps = max(1, min(int(fitting), 4 * work.max_steps))
            slice_s = float("inf")
        work.lane.call("slice", "run_slice", (slice_s, self.options.checkpoint_every_s, work.max_steps))

    def _on_report(self, work: _Work, report: SliceReport) -> None:
        task = work.task
        for event in report.events:
            self.emit(event)
        task.facts = merge_facts(task.facts, report)
        if report.unwritten:
            raise ClusterError(str(report.unwritten), hint="make room, or restore the shared path; then resume the run")
        if report.saved:
            accepted = self.store.accept(task.planned, task.attempt, report.saved, task.facts)
            task.accepted.insert(0, accepted)
            task.losses = 0
            self._tell_accepted(task, accepted)
            self.store.prune(task.planned, task.accepted, task.attempt)
        if report.breach:
            self._tell_breach(task, report.breach)
            self._fail(work, report.breach, final=True)
        elif report.done:
            planned = task.planned
            self.journal.append("done", key=planned.key, digest=planned.digest, path=task.accepted[0].path)
            self._finish(task)
            self._next_task(work)
        elif self.stopping and (report.saved or work.lane.doing == "save"):
            self._close(work)
        elif self.stopping:
            work.lane.call("save", "save", ())
        else:
            self._next_slice(work)

    # Ending

    def _next_task(self, work: _Work) -> None:
        """Keep a worker that is warm for the next training of the same width, or let it go."""
        now = time.monotonic()
        for task in self.waiting:
            same = (task.planned.need, task.planned.workers) == (work.lane.need, len(work.lane.nodes))
            if same and task.not_before <= now and not self.stopping:
                self.waiting.remove(task)
                self._assign(work, task)
                return
        self._close(work)

    def _finish(self, task: _Task, error: RyotError | None = None, cached: bool = False) -> None:
        job = task.planned.job
        newest = task.accepted[0] if task.accepted else None
        task.result = TrainResult(
            variant=job.variant.name,
            seed=job.seed,
            checkpoint=self.run_dir / newest.path if newest else None,
            sha256=newest.sha256 if newest else "",
            step=newest.step if newest else 0,
            attempts=task.attempts,
            facts=task.facts,
            cached=cached,
            error=error,
        )
        wall_s = time.monotonic() - task.wall_begin if task.wall_begin else 0.0
        status: StageStatus = "failed" if error else "cached" if cached else "end"
        self._tell(task, status, str(error or ""), wall_s)
        if self._callbacks:
            self._callbacks.put(task.result)

    def _fail(self, work: _Work, error: RyotError, *, final: bool) -> None:
        """End a training; the others go on. A `final` failure would happen again: resuming does not try it."""
        planned = work.task.planned
        log.info("%s failed: %s", planned.key, error)
        self.journal.append("failed", key=planned.key, digest=planned.digest, reason=str(error), final=final)
        self._finish(work.task, error=error)
        self._next_task(work)

    def _lose(self, work: _Work, error: BaseException) -> None:
        """A worker is gone: try again from the last accepted checkpoint, later each time."""
        task, planned = work.task, work.task.planned
        self._close(work, kill=True)
        task.losses += 1
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if task.losses > self.options.max_losses:
            reason = f"{planned.key}: lost {task.losses} workers in a row; the last: {reason}"
            self.journal.append("failed", key=planned.key, digest=planned.digest, reason=reason, final=False)
            self._finish(task, error=ClusterError(reason, hint="resume the run when the cluster is well again"))
            return
        wait_s = min(30.0, self.options.backoff_s * 2 ** (task.losses - 1))
        task.not_before = time.monotonic() + wait_s
        self._load_accepted(task)
        step = task.accepted[0].step if task.accepted else 0
        log.info("%s: lost its worker on %s: %r", planned.key, work.lane.where, error.__cause__ or error)
        then = f"again from step {step} in {wait_s:g} s"
        self._tell(task, "lost", f"{reason} on {work.lane.where}; {then}")
        self.waiting.append(task)

    def _give_up_hung(self) -> None:
        now = time.monotonic()
        for work in list(self.works):
            limit = self.options.start_timeout_s if work.lane.doing == "start" else self.options.slice_timeout_s
            if now - work.lane.since > limit:
                self._lose(work, TimeoutError(f"no report within {limit:g} s"))

    def _close(self, work: _Work, *, kill: bool = False) -> None:
        """End the actors of a training and free their cores."""
        self.works.remove(work)
        for node in work.lane.nodes:
            self.placement.give_back(node, work.lane.need)
        work.lane.close(kill=kill)

    # Telling

    def _tell(self, task: _Task, status: StageStatus, detail: str = "", wall_s: float | None = None) -> None:
        self._emit_of(task, StageEvent, stage="train", status=status, wall_s=wall_s, detail=detail)

    def _tell_breach(self, task: _Task, breach: GateBreach) -> None:
        value = breach.value if math.isfinite(breach.value) else None
        self._emit_of(task, GateEvent, gate=breach.gate, passed=False, value=value, limit=breach.limit)

    def _tell_accepted(self, task: _Task, new: Accepted) -> None:
        self._emit_of(task, CheckpointEvent, step=new.step, path=new.path, sha256=new.sha256)

    def _emit_of(self, task: _Task, kind: Callable[..., Event], **facts: Any) -> None:
        job = task.planned.job
        self.emit(kind(variant=job.variant.name, seed=job.seed, **facts))


def train_variants(
    jobs: Sequence[PlannedJob],
    *,
    cluster: Cluster,
    run_dir: Path,
    journal: Journal,
    emit: Callable[[Event], None],
    options: DriverOptions | None = None,
    on_done: OnDone | None = None,
) -> list[TrainResult]:
    """Train all jobs on the cluster and return one result each, in their order; the longest is started first.

    What the journal knows as ended is not done again. `on_done` is called in a thread of its own, for one result
    after the other, while other trainings go on; failed and cached ones included. What it raises is raised here once
    all trainings have ended.

    A first SIGINT or SIGTERM lets the slices in flight end and raises `Interrupted`; a second one raises it at once.
    Raises `ClusterError` when the cluster, the disk or a request cannot carry the run; it can be resumed then.
    """
    with StopSignals() as signals:
        driver = Driver(
            jobs,
            cluster=cluster,
            run_dir=run_dir,
            journal=journal,
            emit=emit,
            options=options or DriverOptions(),
            on_done=on_done,
            signals=signals,
        )
        return driver.run()
