"""Exports of models as tasks of the cluster: each on cores of its own, on a node that sees all it needs."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryot.cluster.cores import CoreClaim, has_cpu_quota, pin_process
from ryot.cluster.options import DriverOptions
from ryot.cluster.placement import Placement, ResourceRequest
from ryot.cluster.probe import probe_nodes
from ryot.cluster.remote import task_on
from ryot.cluster.runtime import Cluster, Node
from ryot.deploy.export import ArtifactResult
from ryot.errors import ClusterError, ExportError, Interrupted, RyotError
from ryot.run.import_job import ImportJob, ImportListener, export_model

if TYPE_CHECKING:
    from ray import ObjectRefGenerator

#: A worker that dies once may have been killed; one that dies twice is too large for its node, or a bug.
MAX_ATTEMPTS = 2

#: How long the driver sleeps at most before it looks at free cores again.
_TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class _Work:
    """A job and the task that is at it."""

    job: ImportJob
    attempt: int
    node: Node


def export_on_cluster(
    cluster: Cluster, jobs: Sequence[ImportJob], *, threads: int, listener: ImportListener, options: DriverOptions
) -> None:
    """Do all jobs on an open cluster, the largest first; the listener is told what becomes of each.

    Whatever ends this early ends the tasks too. Raises `ClusterError` when no node can take them, and `Interrupted`
    when the time limit is reached.
    """
    exports = _Exports(cluster, jobs, threads, listener, options)
    try:
        exports.run()
    finally:
        exports.cancel()


class _Exports:
    def __init__(
        self,
        cluster: Cluster,
        jobs: Sequence[ImportJob],
        threads: int,
        listener: ImportListener,
        options: DriverOptions,
    ):
        self.cluster, self.listener, self.options = cluster, listener, options
        self.request = ResourceRequest(threads)
        self.waiting = [(job, 1) for job in sorted(jobs, key=lambda job: -job.cost)]
        self.works: dict[ObjectRefGenerator, _Work] = {}
        self.placement = self._find_nodes()
        self._deadline = time.monotonic() + options.max_hours * 3600 if options.max_hours else None
        self._busy_at = time.monotonic()

    def run(self) -> None:
        import ray

        self.placement.check_fits(self.request, 1, "export")
        while self.waiting or self.works:
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise Interrupted("the time limit was reached")
            if not self.cluster.is_whole():
                self._restart_cluster()
            self._fill()
            if not self.works:
                time.sleep(_TICK_S)
                continue
            ready, _ = ray.wait(list(self.works), num_returns=1, timeout=_TICK_S)
            for task in ready:
                self._collect(task)

    def cancel(self) -> None:
        """End every task at once; what it was writing goes with its process."""
        import ray

        for task in self.works:
            ray.cancel(task, force=True)
        self.works.clear()

    def _find_nodes(self) -> Placement:
        """The nodes that see the run folder and all models and texts."""
        placement = Placement(self.cluster)
        if self.cluster.embedded:
            return placement
        folders = list(dict.fromkeys(folder for job, _ in self.waiting for folder in job.folders))
        facts = probe_nodes(self.cluster, folders)
        able = {node for node, found in facts.items() if all(found.seen.get(str(path), False) for path in folders)}
        if not able:
            seen = {str(path) for path in folders if all(not f.seen.get(str(path), False) for f in facts.values())}
            raise ClusterError(
                f"export: no node sees {', '.join(sorted(seen)) or 'all of ' + ', '.join(map(str, folders))}",
                hint="put run folder, models and text on a path that can be written to and that all nodes share",
            )
        placement.only(able)
        return placement

    def _restart_cluster(self) -> None:
        """The embedded Ray has lost its control process or node manager: start another, and all tasks again."""
        works = list(self.works.values())
        self.works.clear()
        self.cluster.restart()
        self.placement = Placement(self.cluster)
        for work in works:
            self._retry(work, ClusterError("Ray itself died"))

    def _fill(self) -> None:
        """Give free cores to waiting jobs; `ClusterError` when there were none for long."""
        now = time.monotonic()
        if self.works:
            self._busy_at = now
        elif now - self._busy_at > self.options.cores_timeout_s:
            raise ClusterError(
                f"no node has had room for the export of {self.waiting[0][0].name} for "
                f"{self.options.cores_timeout_s:g} s",
                hint="resume the run when the cluster has free CPUs again",
            )
        if self.waiting:
            self.placement.look()
        while self.waiting and (nodes := self.placement.acquire(self.request)):
            self._start(*self.waiting.pop(0), nodes[0])

    def _start(self, job: ImportJob, attempt: int, node: Node) -> None:
        task = task_on(node.node_id, _export, num_cpus=self.request.threads, num_returns="streaming")
        self.works[task.remote(job, self.request.threads)] = _Work(job, attempt, node)
        self.listener.begun(job, node.name)

    def _collect(self, task: ObjectRefGenerator) -> None:
        """Take in the next thing that a task says: a word on its progress, its artifacts, or why there are none."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        work = self.works[task]
        try:
            said: str | list[ArtifactResult] = ray.get(next(task))
        except RayTaskError as error:
            self._release(task)
            cause = error.cause
            reason = cause if isinstance(cause, RyotError) else ExportError(f"{type(cause).__name__}: {cause}")
            self.listener.failed(work.job, reason)
        except (RayError, StopIteration) as error:
            self._release(task)
            self._retry(work, error)
        else:
            if isinstance(said, str):
                self.listener.told(work.job, said)
                return
            self._release(task)
            self.listener.done(work.job, said)

    def _release(self, task: ObjectRefGenerator) -> None:
        self.placement.release(self.works.pop(task).node, self.request)

    def _retry(self, work: _Work, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if work.attempt < MAX_ATTEMPTS:
            self.listener.lost(work.job, f"{work.node.name}: {reason}")
            self.waiting.append((work.job, work.attempt + 1))
            return
        self.listener.failed(
            work.job,
            ClusterError(
                f"export of {work.job.name}: its worker failed {work.attempt} times ({reason})",
                hint="is there enough memory? give a smaller --context, or fewer models at a time",
            ),
        )


def _export(job: ImportJob, threads: int) -> Iterator[str | list[ArtifactResult]]:
    """Runs in a worker: yields a word on each stage, and at last the artifacts."""
    claim = None if has_cpu_quota() else CoreClaim(threads)
    told: queue.SimpleQueue[str | Future[list[ArtifactResult]]] = queue.SimpleQueue()
    try:
        if claim and claim.cores:
            pin_process(claim.cores)
        with ThreadPoolExecutor(1) as pool:
            exported: Future[list[ArtifactResult]] = pool.submit(export_model, job, told.put)
            exported.add_done_callback(told.put)
            while isinstance(said := told.get(), str):
                yield said
            yield exported.result()
    finally:
        if claim:
            claim.release()
