"""What a run asks of whatever computes for it. `ryot.cluster` is the one that there is: Ray, embedded or joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ryot.artifact import ArtifactId
from ryot.config import VariantConfig
from ryot.edge.protocol import MeasureResult, MeasureSpec
from ryot.events import Event
from ryot.optimize.kernels import KernelDecision
from ryot.run.folder import RunFolder
from ryot.run.import_job import ImportJob, ImportListener
from ryot.run.journal import Journal
from ryot.run.training import OnDone, Training, TrainResult
from ryot.train.dataset import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class Requirements:
    """What a run needs of its executor, said before the first worker is asked for."""

    threads: int
    """Cores of each."""
    workers: int
    """Workers that one training takes."""
    bench_threads: int
    """Cores of the node that measures."""
    gpus: int
    """GPUs of each."""
    folders: tuple[Path, ...]
    """Folders of the driver that the nodes may or may not see."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What was measured, and on what."""

    results: Mapping[ArtifactId, list[MeasureResult]]
    machine: Mapping[str, object]
    node: str = ""
    """The node of a cluster; empty for this machine."""


class Executor(Protocol):
    """Computes for one run at a time."""

    @property
    def is_open(self) -> bool:
        """Whether it holds what it computes with; opened when a stage needs it, and kept until `close`."""

    @property
    def bench_label(self) -> str:
        """Which nodes measure; empty for this machine."""

    @property
    def has_own_machines(self) -> bool:
        """Whether what it computes on are other machines than this one."""

    def open(self, needed: Requirements, log_dir: Path) -> str:
        """Get ready, refuse at once what can never be done, and say in a few words what there is."""

    def has_gpus(self, *, threads: int, workers: int) -> bool:
        """Whether so many workers, of so many cores each, can have a GPU each; asked of one that is open."""

    def tune(self, variant: VariantConfig, dataset: Dataset, cache_dir: Path, *, threads: int) -> KernelDecision:
        """The kernel decision for a variant, taken where it will be trained."""

    def train(
        self,
        trainings: Sequence[Training],
        *,
        folder: RunFolder,
        journal: Journal,
        emit: Callable[[Event], None],
        on_done: OnDone,
    ) -> list[TrainResult]:
        """Train all; what the journal knows as ended is not done again. `on_done` is called with each result."""

    def export(self, jobs: Sequence[ImportJob], *, threads: int, listener: ImportListener) -> None:
        """Export models, several at a time where there are cores; `listener` is told what becomes of each."""

    def measure(
        self,
        specs: Mapping[ArtifactId, MeasureSpec],
        *,
        rounds: int,
        log_dir: Path,
        on_result: Callable[[ArtifactId, MeasureResult], None],
    ) -> Measured:
        """Measure interleaved, with nothing else running there."""

    def close(self) -> None:
        """Let go of everything."""
