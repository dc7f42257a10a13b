"""The training loop: one variant with one seed, in chunks, stoppable and resumable at any step.

A step depends only on the weights, the optimizer's state and the step's number, so a training that goes on from a
checkpoint computes what it would have computed anyway: bit for bit on one thread.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ryot.config import KernelPlan, VariantConfig, to_mapping
from ryot.errors import CheckpointError, RyotError
from ryot.events import EvalEvent, Event, StepEvent
from ryot.mapping import Unchecked
from ryot.train.batch import Batch
from ryot.train.checkpoint import load_training_state, load_training_values
from ryot.train.dataset import Batches, Dataset, load_dataset
from ryot.train.evaluate import evaluate, window_counts
from ryot.train.gates import check_step
from ryot.train.heap import frozen_heap
from ryot.train.optimizer import schedule_factor
from ryot.train.packing import PackedBatches
from ryot.train.saving import load_trained, save_training
from ryot.train.sensors import read_frequency_mhz, read_temperature_c
from ryot.train.step import TrainStep
from ryot.train.teaching import Teacher

#: How often a run reports: step events and losses on the way, both spread evenly over its steps.
STEP_EVENTS = 100
EVALS_ON_THE_WAY = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """One training: a recipe, a seed and the data."""

    variant: VariantConfig
    seed: int
    dataset_dir: str
    """Folder that `load_dataset` reads."""

    @property
    def key(self) -> str:
        """Name of the job in paths and messages."""
        return f"{self.variant.name}/seed-{self.seed}"


def build_batches(dataset: Dataset, variant: VariantConfig, seed: int) -> Batches | PackedBatches:
    """The batches of a training: stretches of text, or packed records. Raises `DataError` where there are too few."""
    kind = PackedBatches if dataset.has_records else Batches
    return kind(dataset, length=variant.sequence_length, batch_size=variant.train.batch_size, seed=seed)


class Trainer:
    """A training in progress. Make it new, or go on from a checkpoint with `resume`."""

    def __init__(self, job: TrainJob, plan: KernelPlan, teacher: Teacher | None = None):
        """`teacher` gives the probabilities that a recipe with `[distill]` learns from."""
        assert (teacher is not None) == (job.variant.distill is not None)
        torch.set_num_threads(plan.threads)
        torch.manual_seed(job.seed)
        self.job, self.plan = job, plan
        variant = job.variant
        self.dataset: Dataset = load_dataset(Path(job.dataset_dir))
        self._take_step = self._build_step()
        self.model = self._take_step.model
        self._teacher = teacher
        self._batches = build_batches(self.dataset, variant, job.seed)
        self.num_steps = variant.num_steps
        self._quick_windows, self._full_windows = window_counts(variant)
        self.step = 0
        self.train_wall_s = self.compile_s = self.grad_norm_max = 0.0
        self._first_loss: float | None = None
        self._compiled = not plan.compile
        self._since = _Window()
        self._process = psutil.Process()

    def _build_step(self) -> TrainStep:
        return TrainStep(self.job.variant, self.plan)

    @classmethod
    def resume(cls, job: TrainJob, plan: KernelPlan, checkpoint: Path, teacher: Teacher | None = None) -> Trainer:
        """A training that goes on after the last step of `checkpoint`.

        Raises `CheckpointError` when the checkpoint was made with another recipe, seed, corpus or kernel plan, with
        the first difference.
        """
        state, tensors = load_training_state(checkpoint)
        trainer = cls(job, plan, teacher)
        check_resumable(checkpoint, **trainer._identity())
        load_trained(trainer.model, job.variant, checkpoint, tensors)
        trainer._load_optimizer(tensors)
        trainer.step = state["step"]
        trainer.train_wall_s, trainer.compile_s = state["train_wall_s"], state["compile_s"]
        trainer.grad_norm_max, trainer._first_loss = state["grad_norm_max"], state["first_loss"]
        trainer._take_step.scaler.load_state_dict(state["scaler"])
        trainer._load_extra(state, tensors)
        return trainer

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return self.step >= self.num_steps

    @property
    def tokens(self) -> int:
        """Training tokens seen so far."""
        return self.step * self.job.variant.step_tokens

    def run_chunk(self, max_seconds: float, max_steps: int | None = None) -> list[Event]:
        """Train for about `max_seconds` (at least one step); returns what is to be told.

        Held-out losses are taken before the first step, evenly on the way, and in full (validation and test) after the
        last. Raises `GateBreach` when a safety gate is breached, and does not take back the step that did it;
        `RyotError` when memory is out.
        """
        events: list[Event] = []
        if self.step == 0:
            events.append(self.evaluate("val", self._quick_windows))
        if not self._compiled:
            self.compile_s += self._take_step.warm_up(*self._batches.batch(self.step))
            self._compiled = True
        begin = time.perf_counter()
        last = self.num_steps if max_steps is None else min(self.num_steps, self.step + max_steps)
        with frozen_heap():
            while self.step < last:
                self._train_one()
                events += self._step_events()
                if time.perf_counter() - begin >= max_seconds:
                    break
        if self.done and self.step > 0:
            events += [self.evaluate("val", self._full_windows), self.evaluate("test", self._full_windows)]
        return events

    def _step_events(self) -> list[Event]:
        """What there is to tell of the step just taken."""
        events: list[Event] = []
        if self._due(STEP_EVENTS):
            events.append(self._step_event())
        if not self.done and self._due(EVALS_ON_THE_WAY):
            events.append(self.evaluate("val", self._quick_windows))
        return events

    def evaluate(self, split: str, windows: int) -> EvalEvent:
        """The held-out loss now, as an event."""
        begin = time.perf_counter()
        with self._take_step.rounded(self.step):
            held_out = evaluate(self.model, self.dataset, split, windows, length=self.job.variant.sequence_length)
        return EvalEvent(
            variant=self.job.variant.name,
            seed=self.job.seed,
            step=self.step,
            tokens=self.tokens,
            train_wall_s=self.train_wall_s,
            split=split,
            loss=held_out.loss,
            bits_per_byte=held_out.bits_per_byte,
            eval_wall_s=time.perf_counter() - begin,
        )

    def save(self, directory: Path) -> str:
        """Write a checkpoint with everything that `resume` needs; returns its digest."""
        optimizer = {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
            for key, value in self._take_step.optimizer.state[parameter].items()
        }
        with self._take_step.rounded(self.step if self.done else -1):
            return save_training(
                directory,
                self.model,
                self.job.variant,
                self.dataset,
                done=self.done,
                training={
                    "step": self.step,
                    "train_wall_s": self.train_wall_s,
                    "compile_s": self.compile_s,
                    "grad_norm_max": self.grad_norm_max,
                    "first_loss": self._first_loss,
                    "scaler": self._take_step.scaler.state_dict(),
                    "identity": self._identity(),
                    **self._extra_state(),
                },
                training_tensors={**optimizer, "torch_rng": torch.get_rng_state(), **self._extra_tensors()},
            )

    def _extra_state(self) -> dict[str, object]:
        """What a kind of training keeps beside this in `training/`."""
        return {}

    def _extra_tensors(self) -> dict[str, Tensor]:
        """The same of tensors."""
        return {}

    def _load_extra(self, state: Unchecked, tensors: dict[str, Tensor]) -> None:
        """Take back what these gave."""

    def close(self) -> None:
        """Give back what a kind of training holds beside memory."""

    def _identity(self) -> dict[str, object]:
        """What must be equal for a checkpoint to be gone on from."""
        return {
            **job_identity(self.job.variant, self.job.seed),
            "corpus_sha256": self.dataset.corpus_sha256,
            "plan": to_mapping(self.plan),
        }

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state, fused = self._take_step.optimizer.state, self.plan.fused_optimizer
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            prefix = f"optimizer.{name}."
            state[parameter] = {
                # The fused kernel counts its steps where it runs, the others on the CPU.
                key.removeprefix(prefix): value.to(parameter.device if value.ndim or fused else "cpu")
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        torch.set_rng_state(tensors["torch_rng"])

    def _train_one(self) -> None:
        begin = time.perf_counter()
        factor = self._lr_factor(self.step)
        try:
            batch = Batch(*self._batches.batch(self.step))
            if self._teacher is not None:
                batch = self._teacher.teach(batch)
            loss, norm = self._take_step.take(batch, factor, self.step)
        except (MemoryError, OSError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise RyotError(
                f"{self.job.key}: out of memory in step {self.step} ({str(error).splitlines()[0][:120]})",
                hint="more gradient_accumulation_steps, checkpoint_activations = true, or a smaller preset",
            ) from error
        elapsed = time.perf_counter() - begin
        if self._first_loss is None:
            self._first_loss = loss
        check_step(self.step, loss, norm, first_loss=self._first_loss, vocab_size=self.job.variant.model.vocab_size)
        self.step += 1
        self.train_wall_s += elapsed
        self.grad_norm_max = max(self.grad_norm_max, norm)
        self._since.add(loss, norm, elapsed)

    def _lr_factor(self, step: int) -> float:
        """What the peak learning rates are multiplied with in a step."""
        return schedule_factor(self.job.variant.train, step, self.job.variant.num_steps)

    def _due(self, times: int) -> bool:
        """Whether one of `times` evenly spread points of the run has just been passed."""
        return self.step * times // self.num_steps > (self.step - 1) * times // self.num_steps

    def _step_event(self) -> StepEvent:
        window, self._since = self._since, _Window()
        cpu = self._process.cpu_times()
        factor = self._lr_factor(self.step - 1)
        return StepEvent(
            variant=self.job.variant.name,
            seed=self.job.seed,
            step=self.step,
            num_steps=self.num_steps,
            tokens=self.tokens,
            loss=window.loss / window.steps,
            grad_norm=window.grad_norm,
            learning_rate=self.job.variant.train.learning_rate * factor,
            tokens_per_s=window.steps * self.job.variant.step_tokens / window.wall_s,
            train_wall_s=self.train_wall_s,
            rss_bytes=self._process.memory_info().rss,
            cpu_s=cpu.user + cpu.system,
            temperature_c=read_temperature_c(),
            frequency_mhz=read_frequency_mhz(),
        )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's allocator on the CPU says it in words alone.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def job_identity(variant: VariantConfig, seed: int) -> dict[str, object]:
    """What a checkpoint must have in common with a training before data and kernels are looked at."""
    return {"variant": to_mapping(variant), "seed": seed}


def check_resumable(checkpoint: Path, **identity: object) -> None:
    """Raise `CheckpointError` with the first part of a training's identity that `checkpoint` has otherwise."""
    kept = load_training_values(checkpoint)["identity"]
    was, now = _flatten({name: kept.get(name) for name in identity}), _flatten(identity)
    for name in now | was:
        if was.get(name) != now.get(name):
            raise CheckpointError(
                f"checkpoint {checkpoint}: {name} was {was.get(name)!r}, now {now.get(name)!r}",
                hint="resume with the options of the first run, or start a new run",
            )


def _flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


@dataclass(slots=True)
class _Window:
    """Sums over the steps since the last step event."""

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    wall_s: float = 0.0

    def add(self, loss: float, grad_norm: float, wall_s: float) -> None:
        self.steps += 1
        self.loss += loss
        self.grad_norm = max(self.grad_norm, grad_norm)
        self.wall_s += wall_s
