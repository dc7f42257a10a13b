"""The scheduler of trainings: many variants and seeds on whatever cores there are, losing nothing to what dies.

    waiting --room on a node--> starting --trainer built--> training --last checkpoint accepted--> done
       ^                                                        |
       +------ worker, node or link failed: back-off -----------+-- safety gate, bug, too many failures --> failed

Each worker is asked for one chunk of a few seconds at a time. What becomes of a training is the ledger's to say
(`ryot.run.ledger`); here is who computes it, where, and what is asked of them next. Reports of an attempt that was
given up are never looked at again.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ryot.cluster.callbacks import CallbackThread
from ryot.cluster.folders import pack_folder, unpack_folder
from ryot.cluster.options import DriverOptions
from ryot.cluster.placement import Placement, ResourceRequest
from ryot.cluster.runtime import Cluster
from ryot.cluster.worker import Attempt, ChunkReport, Saved, Started
from ryot.cluster.worker_group import Call, WorkerFailed, WorkerGroup, WorkerLost
from ryot.cluster.workplace import Workplace, find_workplace
from ryot.errors import ClusterError, Interrupted, RyotError, TrainingError
from ryot.events import Event
from ryot.run.folder import RunFolder, worker_log
from ryot.run.journal import Journal
from ryot.run.ledger import Ledger, TrainingState
from ryot.run.signals import StopSignals
from ryot.run.store import CheckpointStore
from ryot.run.training import OnDone, Training, TrainResult
from ryot.train.parallel import Group

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

#: How long the driver sleeps at most before it looks at signals and free cores again.
_TICK_S = 0.2

#: Taking in one report of a worker (`benchmarks/driver_limits.py`, 2026-11-24: 3.1 ms).
_REPORT_S = 0.003


@dataclass(slots=True, eq=False)
class _Work:
    """A training and the workers that are at it."""

    state: TrainingState
    group: WorkerGroup
    max_steps: int | None = None
    """Steps of the next chunk; the ranks of a group must agree on them."""


class Driver:
    """Runs trainings to their end; `train_variants` is the way in."""

    def __init__(
        self,
        trainings: Sequence[Training],
        *,
        cluster: Cluster,
        workplace: Callable[[], Workplace] | None,
        folder: RunFolder,
        journal: Journal,
        emit: Callable[[Event], None],
        options: DriverOptions,
        on_done: OnDone | None,
        signals: StopSignals,
    ):
        self.cluster, self.folder = cluster, RunFolder(folder.path.absolute())
        self.emit, self.options, self.signals = emit, options, signals
        self._callbacks = CallbackThread(on_done) if on_done else None
        store = CheckpointStore(self.folder, journal, keep=options.keep_checkpoints, reread=not cluster.embedded)
        self.ledger = Ledger(
            trainings,
            journal=journal,
            store=store,
            emit=emit,
            on_done=self._callbacks.put if self._callbacks else lambda result: None,
            max_failures=options.max_failures,
            backoff_s=options.backoff_s,
        )
        self.works: list[_Work] = []
        self.placement = Placement(cluster)
        self.unseen: frozenset[Path] = frozenset()
        """Folders that not every node sees: what is in them comes and goes as bytes."""
        self.stopping = ""
        """Why no further chunks are asked for."""
        self._find_workplace = workplace or self._look_around
        self._datasets: dict[Path, ObjectRef[object]] = {}
        self._deadline = time.monotonic() + options.max_hours * 3600 if options.max_hours else None
        self._busy_at = time.monotonic()

    def run(self) -> list[TrainResult]:
        """Train all; one result per training, in their order. Raises `Interrupted` and `ClusterError`."""
        try:
            self.ledger.recall()
            if self.ledger.waiting:
                self._move_in()
            while (self.ledger.waiting and not self.stopping) or self.works:
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
            raise Interrupted(f"{self.stopping}; what was accepted so far is in {self.folder}")
        return self.ledger.results

    def _heed_signals(self) -> None:
        if self.signals.stop_at_once:
            raise Interrupted(f"stopped at once; what was accepted so far is in {self.folder}")
        if self.stopping:
            return
        if self.signals.stop:
            self.stopping = "stopped by a signal"
        elif self._deadline is not None and time.monotonic() > self._deadline:
            self.stopping = "the time limit was reached"
        if self.stopping:
            for work in [w for w in self.works if w.group.call_in_flight is Call.START]:
                self._close(work, kill=True)

    def _wait(self) -> None:
        import ray

        refs = [ref for work in self.works for ref in work.group.refs]
        if not refs:
            time.sleep(_TICK_S)
            return
        ready, _ = ray.wait(refs, num_returns=1, timeout=_TICK_S)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for work in list(self.works):
            self._collect(work, set(ready))

    def _look_around(self) -> Workplace:
        self.cluster.open()
        datasets = {Path(s.training.dataset_dir) for s in self.ledger.waiting}
        return find_workplace(self.cluster, [self.folder.path, *datasets])

    def _move_in(self) -> None:
        """Take the nodes that there are, and refuse what can't be run on them."""
        place = self._find_workplace()
        self.placement, self.unseen = place.placement, place.unseen
        for request, workers in {(_request(s.training), s.training.workers) for s in self.ledger.waiting}:
            self.placement.check_fits(request, workers, "training")
        if self.folder.path in self.unseen:
            log.info("nodes do not see %s: checkpoints travel through the driver", self.folder)

    def _restart_cluster(self) -> None:
        """The embedded Ray has lost its control process or node manager: start another, and all trainings again."""
        error = ClusterError("Ray itself died")
        for work in list(self.works):
            self._lose(work, error)
        log.warning("%s: it is started again", error)
        self.cluster.restart()
        self.placement = Placement(self.cluster)
        self._datasets.clear()

    # Starting

    def _fill(self) -> None:
        """Give each free core to the longest waiting training; `ClusterError` when none was free for long."""
        now, waiting = time.monotonic(), self.ledger.waiting
        if self.works or not waiting:
            self._busy_at = now
        elif now - self._busy_at > self.options.cores_timeout_s:
            raise ClusterError(
                f"no node has had room for {waiting[0].training.key} for {self.options.cores_timeout_s:g} s",
                hint="resume the run when the cluster has free CPUs again",
            )
        if not waiting or self.stopping:
            return
        waiting.sort(key=lambda s: -s.training.cost)
        self.placement.look()
        for state in list(waiting):
            if state.not_before > now:
                continue
            request = _request(state.training)
            nodes = self.placement.acquire(request, state.training.workers)
            if nodes:
                work = _Work(state, WorkerGroup(nodes, request))
                self.works.append(work)
                self._assign(work, state)

    def _assign(self, work: _Work, state: TrainingState) -> None:
        training, newest = state.training, state.newest
        folder = self.ledger.begin(state, work.group.where)
        attempt = Attempt(
            training=training,
            folder=str(folder),
            resume=str(self.folder.path / newest.path) if newest else None,
            travels=self.folder.path in self.unseen,
        )
        dataset_dir = Path(training.dataset_dir)
        dataset = self._packed_dataset(dataset_dir) if dataset_dir in self.unseen else None
        checkpoint = pack_folder(self.folder.path / newest.path) if attempt.travels and newest else None
        work.state = state
        work.max_steps = None if training.workers == 1 else 1
        ranks: list[Group | None] = [None]
        if training.workers > 1:
            meet = self._choose_rendezvous(work.group, folder)
            ranks = [Group(rank=rank, world_size=training.workers, rendezvous=meet) for rank in range(training.workers)]
        work.group.call(Call.START, *[(attempt, rank, dataset, checkpoint) for rank in ranks])

    def _choose_rendezvous(self, group: WorkerGroup, folder: Path) -> str:
        """A place where the ranks of this attempt, and no stale one, meet."""
        if self.folder.path not in self.unseen:
            folder.mkdir(parents=True, exist_ok=True)
            return f"file://{folder}/group"
        # Whether the port is free shows when rank 0 listens; if not, the attempt fails and the next has another.
        return f"tcp://{group.nodes[0].ip}:{random.randrange(20_000, 32_000)}"

    def _packed_dataset(self, dataset_dir: Path) -> ObjectRef[object]:
        import ray

        if dataset_dir not in self._datasets:
            self._datasets[dataset_dir] = ray.put(pack_folder(dataset_dir))
        return self._datasets[dataset_dir]

    # Collecting

    def _collect(self, work: _Work, ready: set[ObjectRef[object]]) -> None:
        """Take in what the workers of a training say, and ask for what comes next."""
        try:
            answer = work.group.collect(ready)
        except WorkerFailed as error:
            self._on_exception(work, error.cause)
        except WorkerLost as error:
            self._lose(work, error)
        else:
            if isinstance(answer, Started):
                self._on_started(work, answer)
            elif isinstance(answer, ChunkReport):
                self._on_report(work, answer)

    def _on_exception(self, work: _Work, cause: BaseException) -> None:
        if isinstance(cause, RyotError) and work.group.call_in_flight is Call.START:
            # The folder was whole when the driver looked: a path that the worker cannot see, or not now.
            self._lose(work, cause)
            return
        training = work.state.training
        where = worker_log(self.ledger.store.attempt_folder(training, work.state.attempt))
        reason = str(cause) if isinstance(cause, RyotError) else f"{type(cause).__name__}: {cause}"
        self.ledger.fail(
            work.state, TrainingError(f"{training.key}: {reason}", hint=f"its worker's log: {where}"), final=False
        )
        self._next_training(work)

    def _on_started(self, work: _Work, started: Started) -> None:
        cores = f"cores {','.join(map(str, started.cores))}" if started.cores else "not pinned"
        ranks = f"{len(work.group.nodes)} ranks, " if len(work.group.nodes) > 1 else ""
        where = f"step {started.step} on {work.group.where}, {ranks}{cores}, attempt {work.state.attempt}"
        self.ledger.tell(work.state, "begin", where)
        self._next_chunk(work)

    def _next_chunk(self, work: _Work) -> None:
        # With very many workers longer chunks, so that taking in their reports stays a quarter of the driver's time.
        chunk_s = max(self.options.chunk_s, 4 * _REPORT_S * len(self.works))
        if work.max_steps is not None:
            if work.group.call_in_flight is Call.CHUNK:
                fitting = work.max_steps * chunk_s / max(time.monotonic() - work.group.since, 1e-3)
                work.max_steps = max(1, min(int(fitting), 4 * work.max_steps))
            chunk_s = float("inf")
        work.group.call(Call.CHUNK, (chunk_s, self.options.checkpoint_every_s, work.max_steps))

    def _on_report(self, work: _Work, report: ChunkReport) -> None:
        state = work.state
        for event in report.events:
            self.emit(event)
        state.metrics = state.metrics.after(report.counters, report.events)
        if report.unwritten:
            raise ClusterError(str(report.unwritten), hint="make room, or restore the shared path; then resume the run")
        if report.saved:
            self._accept(state, report.saved)
        if report.breach:
            self.ledger.breach(state, report.breach)
            self._next_training(work)
        elif report.done:
            self.ledger.finish(state)
            self._next_training(work)
        elif self.stopping and (report.saved or work.group.call_in_flight is Call.SAVE):
            self._close(work)
        elif self.stopping:
            work.group.call(Call.SAVE, ())
        else:
            self._next_chunk(work)

    def _accept(self, state: TrainingState, saved: Saved) -> None:
        path = Path(saved.path)
        if saved.packed is not None:
            unpack_folder(saved.packed, path)
        self.ledger.accept(state, step=saved.step, path=path, sha256=saved.sha256)

    # Ending

    def _next_training(self, work: _Work) -> None:
        """Keep workers that are warm for the next training of the same width, or let them go."""
        now = time.monotonic()
        for state in self.ledger.waiting:
            wanted = (_request(state.training), state.training.workers)
            same = wanted == (work.group.request, len(work.group.nodes))
            if same and state.not_before <= now and not self.stopping:
                self._assign(work, state)
                return
        self._close(work)

    def _lose(self, work: _Work, error: BaseException) -> None:
        """Its workers are gone, or given up."""
        self._close(work, kill=True)
        self.ledger.retry(work.state, error, work.group.where)

    def _give_up_hung(self) -> None:
        now = time.monotonic()
        for work in list(self.works):
            starting = work.group.call_in_flight is Call.START
            limit = self.options.start_timeout_s if starting else self.options.chunk_timeout_s
            if now - work.group.since > limit:
                self._lose(work, TimeoutError(f"no report within {limit:g} s"))

    def _close(self, work: _Work, *, kill: bool = False) -> None:
        """End the workers of a training and free their cores."""
        self.works.remove(work)
        for node in work.group.nodes:
            self.placement.release(node, work.group.request)
        work.group.close(kill=kill)


def _request(training: Training) -> ResourceRequest:
    """What each worker of a training takes up."""
    # Rollout workers stand on their trainer's node, on cores that it asks for.
    rollouts = training.variant.rlvr.rollout_workers if training.variant.rlvr else 0
    return ResourceRequest(training.kernels.threads + rollouts, gpus=1 if training.kernels.device == "cuda" else 0)


def train_variants(
    trainings: Sequence[Training],
    *,
    cluster: Cluster,
    folder: RunFolder,
    journal: Journal,
    emit: Callable[[Event], None],
    options: DriverOptions | None = None,
    on_done: OnDone | None = None,
    workplace: Callable[[], Workplace] | None = None,
) -> list[TrainResult]:
    """Train all on the cluster and return one result each, in their order; the longest is started first.

    What the journal knows as ended is not done again. `on_done` is called in a thread of its own, for one result
    after the other, while other trainings go on; failed and cached ones included. What it raises is raised here once
    all trainings have ended. `workplace` gives the nodes, if someone has looked at them before.

    A first SIGINT or SIGTERM lets the chunks in flight end and raises `Interrupted`; a second one raises it at once.
    Raises `ClusterError` when the cluster, the disk or a request cannot carry the run; it can be resumed then.
    """
    with StopSignals() as signals:
        driver = Driver(
            trainings,
            cluster=cluster,
            workplace=workplace,
            folder=folder,
            journal=journal,
            emit=emit,
            options=options or DriverOptions(),
            on_done=on_done,
            signals=signals,
        )
        return driver.run()
