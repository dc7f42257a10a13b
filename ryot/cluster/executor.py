"""Ray as the executor of a run: an embedded cluster for this run alone, or one that is joined."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ryot.artifact import ArtifactId
from ryot.cluster.driver import train_variants
from ryot.cluster.exporting import export_on_cluster
from ryot.cluster.measuring import find_node, measure_on_cluster
from ryot.cluster.options import ClusterOptions, DriverOptions
from ryot.cluster.placement import ResourceRequest
from ryot.cluster.runtime import Cluster, build_cluster
from ryot.cluster.tuning import tune_on_cluster
from ryot.cluster.workplace import Workplace, find_workplace
from ryot.config import VariantConfig
from ryot.edge.measure import measure_rounds, record_environment
from ryot.edge.protocol import MeasureResult, MeasureSpec
from ryot.events import Event
from ryot.run.executor import Executor, Measured, Requirements
from ryot.run.folder import RunFolder
from ryot.run.import_job import ImportJob, ImportListener
from ryot.run.journal import Journal
from ryot.run.training import OnDone, Training, TrainResult
from ryot.train.dataset import Dataset

if TYPE_CHECKING:
    from ryot.optimize.kernels import KernelDecision

log = logging.getLogger(__name__)


class RayExecutor(Executor):
    """Opens its cluster when the first stage needs it; the nodes are looked at once."""

    def __init__(self, cluster: ClusterOptions, driver: DriverOptions):
        self.cluster_options, self.driver_options = cluster, driver
        self._cluster: Cluster | None = None
        self._workplace: Workplace | None = None

    @property
    def is_open(self) -> bool:
        return self._cluster is not None and self._cluster.is_open

    @property
    def bench_label(self) -> str:
        return self.cluster_options.bench_label

    @property
    def has_own_machines(self) -> bool:
        return self.cluster_options.address is not None

    def open(self, needed: Requirements, log_dir: Path) -> str:
        """Raises `ClusterError` for what the cluster can never do for this run."""
        cluster = self._connect(log_dir)
        self._workplace = find_workplace(cluster, needed.folders)
        self._workplace.placement.check_fits(ResourceRequest(needed.threads, needed.gpus), needed.workers, "training")
        if not cluster.embedded:
            find_node(cluster, self.bench_label, needed.bench_threads)
        nodes = cluster.nodes()
        return f"{len(nodes)} node, {sum(n.cpus for n in nodes):g} cores at {cluster.address}"

    def has_gpus(self, *, threads: int, workers: int) -> bool:
        assert self._workplace is not None
        return self._workplace.placement.count_places(ResourceRequest(threads, gpus=1)) >= workers

    def tune(self, variant: VariantConfig, dataset: Dataset, cache_dir: Path, *, threads: int) -> KernelDecision:
        assert self._cluster is not None
        return tune_on_cluster(self._cluster, variant, dataset, cache_dir, threads=threads)

    def train(
        self,
        trainings: Sequence[Training],
        *,
        folder: RunFolder,
        journal: Journal,
        emit: Callable[[Event], None],
        on_done: OnDone,
    ) -> list[TrainResult]:
        workplace = self._workplace
        return train_variants(
            trainings,
            cluster=self._cluster or self._build(folder.logs),
            folder=folder,
            journal=journal,
            emit=emit,
            options=self.driver_options,
            on_done=on_done,
            workplace=None if workplace is None else lambda: workplace,
        )

    def export(self, jobs: Sequence[ImportJob], *, threads: int, listener: ImportListener) -> None:
        assert self._cluster is not None
        export_on_cluster(self._cluster, jobs, threads=threads, listener=listener, options=self.driver_options)

    def measure(
        self,
        specs: Mapping[ArtifactId, MeasureSpec],
        *,
        rounds: int,
        log_dir: Path,
        on_result: Callable[[ArtifactId, MeasureResult], None],
    ) -> Measured:
        if not self.has_own_machines or not specs:
            machine = record_environment()
            return Measured(results=measure_rounds(specs, rounds=rounds, on_result=on_result), machine=machine)
        measured = measure_on_cluster(self.cluster_options, specs, rounds=rounds, log_dir=log_dir)
        for artifact, results in measured.results.items():
            for result in results:
                on_result(artifact, result)
        return measured

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()
        self._cluster = self._workplace = None

    def _build(self, log_dir: Path) -> Cluster:
        self._cluster = build_cluster(self.cluster_options, log_dir=log_dir)
        return self._cluster

    def _connect(self, log_dir: Path) -> Cluster:
        cluster = self._build(log_dir)
        cluster.open()
        return cluster
