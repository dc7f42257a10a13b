"""What the driver is given and what it gives back: planned trainings, options, results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ryot
from ryot.cluster.placement import Need
from ryot.cluster.worker import SliceReport
from ryot.config import KernelPlan, digest, to_mapping
from ryot.errors import RyotError
from ryot.events import EvalEvent
from ryot.train.dataset import load_dataset
from ryot.train.loop import TrainJob
from ryot.train.parallel import check_shares


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverOptions:
    """How trainings are sliced, kept and retried."""

    slice_s: float = 3.0
    """Seconds of training between two reports of a worker."""
    checkpoint_every_s: float = 30.0
    """Seconds between two checkpoints; a slice longer than that ends with one."""
    keep_checkpoints: int = 2
    """Accepted checkpoints of a training that stay on disk."""
    max_losses: int = 6
    """Losses in a row, without a checkpoint accepted in between, after which a training is failed."""
    backoff_s: float = 0.5
    """Wait before the first retry; doubles with each further loss, up to 30 s."""
    start_timeout_s: float = 120.0
    """Time in which a worker must have built its trainer."""
    slice_timeout_s: float = 1800.0
    """Time after which a slice that has not reported (a hung worker) counts as lost."""
    cores_timeout_s: float = 600.0
    """Time after which a run that finds no free core anywhere is given up."""
    max_hours: float | None = None
    """Hours after which the run is stopped as by a signal."""


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A training and how its steps are computed; `plan.threads` is the number of cores it gets."""

    job: TrainJob
    plan: KernelPlan
    digest: str
    """Over everything that decides what the training learns."""
    workers: int = 1
    """Processes that train it together, each with `plan.threads` cores and its share of every batch."""

    @property
    def key(self) -> str:
        """Name of the job in the journal, in paths and in messages."""
        return self.job.key

    @property
    def need(self) -> Need:
        """What each of its workers takes up."""
        return Need(self.plan.threads, gpus=1 if self.plan.device == "cuda" else 0)

    @property
    def cost(self) -> float:
        """Rough work in it, to start long ones first."""
        variant = self.job.variant
        return float(variant.train.tokens) * variant.model.num_parameters / (self.plan.threads * self.workers)


def plan_job(job: TrainJob, plan: KernelPlan, *, workers: int = 1) -> PlannedJob:
    """The job with the digest of its inputs: recipe, seed, corpus, kernel plan, ranks and ryot's version.

    Raises `ConfigError` when a batch has no equal shares for `workers` ranks.
    """
    check_shares(job, workers)
    corpus = load_dataset(Path(job.dataset_dir)).corpus_sha256
    inputs = digest(to_mapping(job.variant), job.seed, corpus, to_mapping(plan), ryot.__version__, workers)
    return PlannedJob(job, plan, inputs, workers)


@dataclass(frozen=True, slots=True)
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
    facts: dict[str, Any]
    """tokens, train_wall_s, compile_s, grad_norm_max, initial_val_loss, val_loss, val_bpb, test_loss, test_bpb and
    evals, the list of [step, tokens, train_wall_s, val_loss]."""
    cached: bool = False
    """Whether it had ended before this driver started."""
    error: RyotError | None = None
    """Why it failed."""


OnDone = Callable[[TrainResult], None]


def merge_facts(facts: dict[str, Any], report: SliceReport) -> dict[str, Any]:
    """What is known after a report: the worker's counters and the held-out losses among its events."""
    merged = {**facts, **report.facts}
    evals = list(facts.get("evals", []))
    for event in report.events:
        if not isinstance(event, EvalEvent):
            continue
        if event.split == "val":
            if event.step == 0:
                merged["initial_val_loss"] = event.loss
            merged["val_loss"], merged["val_bpb"] = event.loss, event.bits_per_byte
            # A training that ended before its end was journaled evaluates its last step again.
            if not evals or event.step > evals[-1][0]:
                evals.append([event.step, event.tokens, event.train_wall_s, event.loss])
        else:
            merged["test_loss"], merged["test_bpb"] = event.loss, event.bits_per_byte
    merged["evals"] = evals
    return merged
