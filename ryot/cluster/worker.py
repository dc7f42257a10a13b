"""The actor that trains: it holds some cores of one machine and works through one attempt after the other.

It decides nothing about recovery. It computes chunks, writes checkpoints into the folder of its own attempt, and
tells the driver; whether a checkpoint counts is the driver's to say.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from ryot import scratch
from ryot.cluster.cores import CoreClaim, has_cpu_quota, pin_process
from ryot.cluster.folders import pack_folder, unpack_folder
from ryot.cluster.rollout_fleet import make_ray_fleet
from ryot.config import replace
from ryot.deploy.teacher import open_teacher
from ryot.errors import CheckpointError, ClusterError, RyotError
from ryot.events import Event
from ryot.reinforce.trainer import ReinforceTrainer, build_trainer
from ryot.run.folder import checkpoint_folder, worker_log
from ryot.run.metrics import TrainMetrics
from ryot.run.training import Training
from ryot.train.gates import GateBreach
from ryot.train.loop import Trainer, TrainJob
from ryot.train.parallel import Group, ShardedTrainer, join_group, leave_group

log = logging.getLogger(__name__)

SCRATCH_PREFIX = "ryot-worker-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt at one training."""

    training: Training
    folder: str
    """Where this attempt's checkpoints go; with `travels` a path of the driver's machine that only names them."""
    resume: str | None
    """The checkpoint to resume from."""
    travels: bool = False
    """Whether this machine sees none of the driver's paths, so that checkpoints and data come and go as bytes."""


@dataclass(frozen=True, slots=True)
class Started:
    """Where and from which step an attempt begins."""

    hostname: str
    pid: int
    cores: list[int]
    """Empty when the worker is not pinned."""
    step: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint as the worker wrote it."""

    step: int
    path: str
    sha256: str
    packed: bytes | None = field(default=None, repr=False)
    """Its files, when the driver cannot see `path`."""


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """What a worker has done since its last report."""

    step: int
    done: bool
    events: list[Event]
    saved: Saved | None
    counters: TrainMetrics
    """What the trainer counts; without losses, which are among the events."""
    breach: GateBreach | None = None
    """The safety gate that stopped the training."""
    unwritten: RyotError | None = None
    """Why a checkpoint that was due could not be written."""


class TrainWorker:
    """The body of the Ray actor (`worker_group.py` wraps it); plain methods, so that it can be read without Ray."""

    def __init__(self, threads: int):
        self.claim = CoreClaim(threads) if not has_cpu_quota() else None
        self._cores = self.claim.cores if self.claim else []
        if self._cores:
            pin_process(self._cores)
        self._trainer: Trainer | None = None
        self._attempt: Attempt | None = None
        self._rank = 0
        self._grouped = False
        self._saved_step = -1
        self._saved_at = 0.0
        self._scratch: Path | None = None
        self._scratch_lock = -1

    def start(
        self,
        attempt: Attempt,
        group: Group | None = None,
        dataset: bytes | None = None,
        checkpoint: bytes | None = None,
    ) -> Started:
        """Build the trainer, new or from a checkpoint, after meeting the other ranks of the group.

        `dataset` and `checkpoint` are folders packed by the driver.
        """
        self._close_trainer()
        self._rank = group.rank if group else 0
        job: TrainJob = attempt.training
        kernels = attempt.training.kernels
        resume = Path(attempt.resume) if attempt.resume else None
        if not attempt.travels:
            _log_to(Path(attempt.folder), self._rank)
        log.info("%s in process %d on %s, cores %s", job.key, os.getpid(), socket.gethostname(), self._cores)
        if attempt.travels or dataset is not None:
            own = self._fresh_scratch()
            if dataset is not None:
                unpack_folder(dataset, own / "dataset")
                job = replace(job, dataset_dir=str(own / "dataset"))
            if checkpoint is not None:
                resume = own / "resume"
                unpack_folder(checkpoint, resume)
        if group and not self._grouped:
            # The group outlives the training: the same workers may be given the next one.
            join_group(group, kernels, own_address())
            self._grouped = True
        # Beside the shards where those of the driver are seen; what a teacher said is then said to all seeds.
        cache = Path(attempt.training.dataset_dir).parents[1] if dataset is None else self._fresh_cache()
        teacher = open_teacher(job.variant, cache)
        trainer: Trainer
        if group:
            kind = ShardedTrainer
            trainer = kind.resume(job, kernels, resume, teacher) if resume else kind(job, kernels, teacher)
        else:
            trainer = build_trainer(job, kernels, teacher, resume)
        if isinstance(trainer, ReinforceTrainer):
            trainer.make_fleet = make_ray_fleet
        self._trainer, self._attempt = trainer, attempt
        self._saved_step, self._saved_at = (trainer.step if resume else -1), time.monotonic()
        log.info("resuming from step %d of %d", trainer.step, trainer.num_steps)
        return Started(socket.gethostname(), os.getpid(), self._cores, trainer.step)

    def run_chunk(self, max_seconds: float, checkpoint_every_s: float, max_steps: int | None = None) -> ChunkReport:
        """Train for about `max_seconds` or for `max_steps`; save when that is due, and always after the last step."""
        assert self._trainer is not None
        try:
            events = self._trainer.run_chunk(max_seconds, max_steps)
        except GateBreach as error:
            return self._report([], breach=error)
        due = time.monotonic() - self._saved_at >= checkpoint_every_s
        return self._report(events, save=due or self._trainer.done)

    def save(self) -> ChunkReport:
        """Save now, unless the last checkpoint is of this step."""
        return self._report([], save=True)

    def _report(self, events: list[Event], *, save: bool = False, breach: GateBreach | None = None) -> ChunkReport:
        trainer = self._trainer
        assert trainer is not None
        saved, unwritten = None, None
        if save and self._rank == 0:
            try:
                saved = self._save()
            except CheckpointError as error:
                unwritten = error
        counters = TrainMetrics(
            tokens=trainer.tokens,
            train_wall_s=trainer.train_wall_s,
            compile_s=trainer.compile_s,
            grad_norm_max=trainer.grad_norm_max,
        )
        return ChunkReport(trainer.step, trainer.done, events, saved, counters, breach, unwritten)

    def _save(self) -> Saved | None:
        trainer, attempt = self._trainer, self._attempt
        assert trainer is not None and attempt is not None
        if trainer.step == self._saved_step:
            return None
        path = checkpoint_folder(Path(attempt.folder), trainer.step)
        target = path
        if attempt.travels:
            assert self._scratch is not None
            target = self._scratch / path.name
        sha256 = trainer.save(target)
        packed = pack_folder(target) if attempt.travels else None
        if attempt.travels:
            shutil.rmtree(target)
        self._saved_step, self._saved_at = trainer.step, time.monotonic()
        return Saved(trainer.step, str(path), sha256, packed)

    def _fresh_cache(self) -> Path:
        assert self._scratch is not None
        return self._scratch / "cache"

    def _fresh_scratch(self) -> Path:
        self._remove_scratch()
        base = Path(tempfile.gettempdir())
        scratch.sweep_stale(base, SCRATCH_PREFIX)
        self._scratch, self._scratch_lock = scratch.make_folder(base, SCRATCH_PREFIX)
        return self._scratch

    def leave(self) -> None:
        """Remove what this worker wrote on its own machine; after a kill the next worker there does it."""
        self._close_trainer()
        if self._grouped:
            leave_group()
            self._grouped = False
        self._remove_scratch()

    def _close_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None

    def _remove_scratch(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
            os.close(self._scratch_lock)
            self._scratch = None


def own_address() -> str:
    """The address by which the cluster knows this node."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


def _log_to(folder: Path, rank: int) -> None:
    """From now on all that this process says goes to the log in its attempt's folder, C++ included."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(worker_log(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ClusterError(f"{folder}: cannot be written on {socket.gethostname()} ({error.strerror})") from error
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
