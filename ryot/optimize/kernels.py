"""KernelOptimizer, the training half: times real steps of a variant on this machine and picks the fastest plan.

One setting is varied at a time (dtype, attention, loss, optimizer), each from the best plan so far; the candidates of a
setting take steps in turn, so that a drifting machine slows all of them. A candidate counts only when its losses over
the same few steps stay within `LOSS_TOLERANCE` of fp32 eager. Compiling is tried last, and only where the steps of the
run could pay for it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ryot.config import KernelPlan, VariantConfig, digest, replace, to_mapping
from ryot.decisions import recall
from ryot.edge.machine import CpuFacts, describe_cpu
from ryot.train.batch import Batch
from ryot.train.dataset import Batches, Dataset
from ryot.train.loop import build_batches
from ryot.train.optimizer import schedule_factor
from ryot.train.packing import PackedBatches
from ryot.train.step import TrainStep

log = logging.getLogger(__name__)

#: What was decided by an older method is not taken over.
SCHEMA = 3
#: Nats that the mean loss of the fixed run may differ from fp32 eager's: a tenth of the spread between seeds of a
#: whole training (0.02 to 0.035, measured), so that a plan cannot be told from another one by what it learns.
LOSS_TOLERANCE = 0.003
#: Steps of the fixed run: 1 to warm up, then the timed ones.
WARM_STEPS, TIMED_STEPS = 1, 4
#: A candidate whose first step takes this many times the fastest one's is not timed further.
HOPELESS = 3.0
#: A candidate must beat the plan so far by this much; less is noise.
MIN_GAIN = 1.03
#: Seconds that compiling forward and backward takes with an empty cache, at the least (measured: 10 to 50).
COLD_COMPILE_S = 15.0
#: The most that compiling was seen to save of a step on a CPU; on a GPU it is tried wherever it could pay at all.
BEST_COMPILE_SAVING = {"cpu": 0.35, "cuda": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A plan that was tried, and what came of it."""

    plan: KernelPlan
    changed: str
    """The setting that differs from the plan it was tried against."""
    step_ms: float
    """Median of the timed steps."""
    steps: int
    """Steps it took: fewer than the others' when it was too slow to go on."""
    loss: float
    """Mean training loss of these steps, nats per token."""
    compile_s: float
    verdict: str
    """Why it was taken or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelDecision:
    """The plan chosen for a variant on this machine, with its evidence."""

    plan: KernelPlan
    candidates: tuple[Candidate, ...]
    cpu: str
    cached: bool = False


def choose_kernels(variant: VariantConfig, dataset: Dataset, cache_dir: Path, *, threads: int = 1) -> KernelDecision:
    """The fastest kernel plan for `variant` on this machine; a variant that is not to be tuned keeps its own.

    Looked up in `cache_dir` by CPU, torch version, recipe and threads; measured (a few seconds) when not there. Call it
    on the core the training will run on, with nothing else running there.
    """
    cpu = describe_cpu()
    start = replace(variant.kernels, threads=threads)
    if not variant.tune:
        return KernelDecision(plan=start, candidates=(), cpu=cpu["model"])
    malloc = os.environ.get("GLIBC_TUNABLES")
    if start.device == "cuda":
        cpu = {**cpu, "model": f"{torch.cuda.get_device_name()}, {cpu['model']}"}
    key = digest(SCHEMA, cpu["model"], cpu["isa"], torch.__version__, variant.model, variant.train, start, malloc)
    path = cache_dir / "kernels" / f"{key[:16]}.json"
    decision, cached = recall(path, KernelDecision, lambda: _measure(variant, start, dataset, cpu))
    return dataclasses.replace(decision, cached=cached)


def format_decision(variant: str, decision: KernelDecision) -> str:
    """The decision and every candidate, one per line, for people."""
    lines = [f"kernels of {variant} on {decision.cpu}: {_describe(decision.plan)}"]
    lines += [
        f"  {c.changed:<22} {c.step_ms:8.2f} ms per step  loss {c.loss:.4f}  {c.verdict}" for c in decision.candidates
    ]
    return "\n".join(lines)


def _describe(plan: KernelPlan) -> str:
    return ", ".join(f"{k}={v}" for k, v in to_mapping(plan).items())


class _FixedRun:
    """The first steps of the training itself under one plan, taken one at a time."""

    def __init__(self, variant: VariantConfig, plan: KernelPlan, batches: Batches | PackedBatches):
        torch.manual_seed(0)
        self.plan, self._variant, self._batches = plan, variant, batches
        self._take_step = TrainStep(variant, plan)
        self.compile_s = self._take_step.warm_up(*batches.batch(0)) if plan.compile else 0.0
        self.losses: list[float] = []
        self.times: list[float] = []

    def step(self) -> None:
        begin = time.perf_counter()
        at = len(self.losses)
        factor = schedule_factor(self._variant.train, at, self._variant.num_steps)
        loss, _ = self._take_step.take(Batch(*self._batches.batch(at)), factor, 0)
        self.times.append(time.perf_counter() - begin)
        self.losses.append(loss)

    @property
    def step_ms(self) -> float:
        return statistics.median(self.times[WARM_STEPS:] or self.times) * 1e3

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


def _measure(variant: VariantConfig, start: KernelPlan, dataset: Dataset, cpu: CpuFacts) -> KernelDecision:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(start.threads)
    batches = build_batches(dataset, variant, 0)
    reference = _run_all([_FixedRun(variant, KernelPlan(threads=start.threads, device=start.device), batches)])[0]
    best, tried = start, []
    try:
        for setting, values in _settings(start):
            plans = [best, *(replace(best, **{setting: v}) for v in values if v != getattr(best, setting))]
            runs = _run_all([_FixedRun(variant, plan, batches) for plan in plans])
            best, candidates = _pick(setting, runs, reference)
            tried += candidates
        if (reason := _compile_refusal(variant, tried, best)) is None:
            runs = _run_all([_FixedRun(variant, plan, batches) for plan in (best, replace(best, compile=True))])
            best, candidates = _pick("compile", runs, reference, steps=variant.num_steps)
            tried += candidates
        else:
            log.info("compile is not tried for %s: %s", variant.name, reason)
    finally:
        torch.set_num_threads(threads_before)
    return KernelDecision(plan=best, candidates=tuple(tried), cpu=cpu["model"])


def _settings(start: KernelPlan) -> Sequence[tuple[str, tuple[object, ...]]]:
    half = ("bf16",) if start.device == "cpu" or torch.cuda.is_bf16_supported() else ("fp16",)
    # The type comes first: which attention and which chunk are fastest depends on it.
    return (
        ("dtype", ("fp32", *half)),
        ("attention", ("explicit", "sdpa")),
        ("loss_chunk", (0, 128, 256, 512)),
        ("fused_optimizer", (True, False)),
    )


def _run_all(runs: list[_FixedRun]) -> list[_FixedRun]:
    """Let all take their steps in turn; one that is hopeless after the first is left behind there."""
    for run in runs:
        run.step()
    fastest = min(run.times[0] for run in runs)
    going = [run for run in runs if run.times[0] <= HOPELESS * fastest]
    for _ in range(WARM_STEPS + TIMED_STEPS - 1):
        for run in going:
            run.step()
    return runs


def _pick(
    setting: str, runs: list[_FixedRun], reference: _FixedRun, *, steps: int | None = None
) -> tuple[KernelPlan, list[Candidate]]:
    """The best of `runs`, the first of which is the plan so far; over `steps`, compiling has to be earned back."""
    so_far, best = runs[0], runs[0]
    for run in runs[1:]:
        if _refusal(run, reference) is None and run.step_ms * MIN_GAIN < best.step_ms and _pays(run, so_far, steps):
            best = run
    candidates = []
    for run in runs:
        verdict = "taken" if run is best else _refusal(run, reference)
        if verdict is None:
            verdict = "not faster" if _pays(run, so_far, steps) else f"compiling ({run.compile_s:.0f} s) does not pay"
        candidates.append(
            Candidate(
                plan=run.plan,
                changed=f"{setting}={getattr(run.plan, setting)}",
                step_ms=run.step_ms,
                steps=len(run.losses),
                loss=run.loss,
                compile_s=run.compile_s,
                verdict=verdict,
            )
        )
    return best.plan, candidates


def _refusal(run: _FixedRun, reference: _FixedRun) -> str | None:
    if len(run.losses) < len(reference.losses):
        return f"more than {HOPELESS:g} times slower in its first step"
    off = abs(run.loss - reference.loss)
    return None if off <= LOSS_TOLERANCE else f"loss is {off:.4f} from fp32 eager's, allowed {LOSS_TOLERANCE}"


def _pays(run: _FixedRun, so_far: _FixedRun, steps: int | None) -> bool:
    return steps is None or (so_far.step_ms - run.step_ms) / 1e3 * steps > run.compile_s


def _compile_refusal(variant: VariantConfig, tried: Sequence[Candidate], best: KernelPlan) -> str | None:
    """Why compiling is not worth trying, or None."""
    if best.device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "there is no C++ compiler"
    step_s = next(c.step_ms for c in reversed(tried) if c.plan == best) / 1e3
    saving = BEST_COMPILE_SAVING[best.device] * step_s * variant.num_steps
    if saving < COLD_COMPILE_S:
        return f"it can save at most {saving:.0f} s of this run and costs at least {COLD_COMPILE_S:.0f} s"
    return None
