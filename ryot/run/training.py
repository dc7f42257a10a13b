"""One training of a run: what is to be trained, what is known of it on the way, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ryot
from ryot.config import KernelPlan, VariantConfig, digest, to_mapping
from ryot.errors import RyotError
from ryot.run.metrics import TrainMetrics
from ryot.train.dataset import load_dataset
from ryot.train.loop import TrainJob
from ryot.train.parallel import check_shares


@dataclass(frozen=True, kw_only=True, slots=True)
class Training(TrainJob):
    """A job for a trainer, and how its steps are computed."""

    kernels: KernelPlan
    """`kernels.threads` is the number of cores that each worker gets."""
    digest: str
    """Over everything that decides what it learns."""
    workers: int = 1
    """Processes that train it together, each with its share of every batch."""

    @property
    def cost(self) -> float:
        """Rough work in it, to start long ones first."""
        work = float(self.variant.train.tokens) * self.variant.model.num_parameters
        return work / (self.kernels.threads * self.workers)


def plan_training(
    variant: VariantConfig, seed: int, dataset_dir: Path, kernels: KernelPlan, *, workers: int = 1
) -> Training:
    """The training with the digest of its inputs: recipe, seed, corpus, kernel plan, workers and ryot's version.

    Raises `ConfigError` when a batch has no equal shares for `workers`.
    """
    job = TrainJob(variant=variant, seed=seed, dataset_dir=str(dataset_dir))
    check_shares(job, workers)
    corpus = load_dataset(dataset_dir).corpus_sha256
    inputs = digest(to_mapping(variant), seed, corpus, to_mapping(kernels), ryot.__version__, workers)
    return Training(
        variant=variant, seed=seed, dataset_dir=str(dataset_dir), kernels=kernels, digest=inputs, workers=workers
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How one training ended."""

    variant: str
    seed: int
    checkpoint: Path | None
    """The last accepted checkpoint; of a failed training possibly None."""
    sha256: str
    step: int
    attempts: int
    """Attempts of this driver: 1 for a training that lost no worker, 0 for a cached one."""
    metrics: TrainMetrics
    cached: bool = False
    """Whether it had ended before this driver started."""
    error: RyotError | None = None
    """Why it failed."""


OnDone = Callable[[TrainResult], None]
