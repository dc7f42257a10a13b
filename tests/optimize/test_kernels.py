from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from ryot.config import KernelPlan, replace
from ryot.events import StepEvent
from ryot.optimize import kernels
from ryot.optimize.kernels import choose_kernels, format_decision
from ryot.train.dataset import Dataset
from ryot.train.loop import Trainer, TrainJob
from tests.conftest import tiny_variant

ALL_STEPS = kernels.WARM_STEPS + kernels.TIMED_STEPS


@pytest.fixture(scope="module")
def decision(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[kernels.KernelDecision, Path]:
    cache = tmp_path_factory.mktemp("decisions")
    return choose_kernels(tiny_variant("optimized"), dataset, cache), cache


def test_every_setting_is_tried_and_the_fastest_that_learns_the_same_is_taken(
    decision: tuple[kernels.KernelDecision, Path],
) -> None:
    found = decision[0]
    tried = {c.changed.split("=")[0] for c in found.candidates}
    assert tried == {"attention", "loss_chunk", "fused_optimizer", "dtype"}  # compiling cannot pay in 12 steps
    for setting in tried:
        group = [c for c in found.candidates if c.changed.startswith(setting + "=")]
        (taken,) = [c for c in group if c.verdict == "taken"]
        assert getattr(found.plan, setting) == getattr(taken.plan, setting)
        for other in group:
            if other.verdict == "not faster":
                assert other.step_ms * kernels.MIN_GAIN >= taken.step_ms


def test_plans_in_fp32_give_the_loss_of_fp32_eager(decision: tuple[kernels.KernelDecision, Path]) -> None:
    losses = [c.loss for c in decision[0].candidates if c.plan.dtype == "fp32" and c.steps == ALL_STEPS]
    assert max(losses) - min(losses) < kernels.LOSS_TOLERANCE


def test_the_losses_are_those_of_the_training_itself(
    decision: tuple[kernels.KernelDecision, Path], dataset: Dataset
) -> None:
    variant = tiny_variant("optimized")
    variant = replace(variant, train=replace(variant.train, final_norm_init=0.1, normalize_embedding=True))
    for candidate in choose_kernels(variant, dataset, decision[1]).candidates:
        if candidate.plan.dtype == "fp32" and candidate.steps == ALL_STEPS:
            trainer = Trainer(TrainJob(variant=variant, seed=0, dataset_dir=str(dataset.path)), candidate.plan)
            losses = [e.loss for e in trainer.run_chunk(60.0, ALL_STEPS) if isinstance(e, StepEvent)]
            assert len(losses) == ALL_STEPS  # 12 steps in all: each is told
            assert statistics.fmean(losses) == pytest.approx(candidate.loss, abs=1e-4)


def test_the_decision_is_found_again_and_says_so(
    decision: tuple[kernels.KernelDecision, Path], dataset: Dataset
) -> None:
    again = choose_kernels(tiny_variant("optimized"), dataset, decision[1])
    assert again == dataclasses.replace(decision[0], cached=True)


def test_another_shape_or_thread_count_is_decided_anew(
    decision: tuple[kernels.KernelDecision, Path], dataset: Dataset
) -> None:
    variant = tiny_variant("optimized")
    smaller = replace(variant, model=replace(variant.model, ff_dim=32))
    assert not choose_kernels(smaller, dataset, decision[1]).cached


def test_the_baseline_is_never_tuned(dataset: Dataset, tmp_path: Path) -> None:
    found = choose_kernels(tiny_variant("baseline"), dataset, tmp_path, threads=2)
    assert found.plan == KernelPlan(threads=2) and found.candidates == ()
    assert list(tmp_path.iterdir()) == []


def test_a_candidate_that_learns_otherwise_is_refused() -> None:
    class Run:
        def __init__(self, loss: float, step_ms: float, dtype: str):
            self.plan, self.loss, self.step_ms, self.compile_s = KernelPlan(dtype=dtype), loss, step_ms, 0.0
            self.losses = [loss]

    plain, fast = Run(5.0, 10.0, "fp32"), Run(5.2, 1.0, "bf16")
    plan, candidates = kernels._pick("dtype", [plain, fast], plain)  # type: ignore[list-item,arg-type]
    assert plan.dtype == "fp32"
    assert [c.verdict for c in candidates] == ["taken", "loss is 0.2000 from fp32 eager's, allowed 0.003"]


def test_compiling_that_a_run_is_too_short_for_is_not_taken() -> None:
    class Run:
        def __init__(self, compile: bool, step_ms: float, compile_s: float):
            self.plan, self.loss, self.step_ms = KernelPlan(compile=compile), 5.0, step_ms
            self.compile_s, self.losses = compile_s, [5.0]

    eager, compiled = Run(False, 100.0, 0.0), Run(True, 50.0, 20.0)
    for steps, taken in ((399, False), (401, True)):
        plan, candidates = kernels._pick("compile", [eager, compiled], eager, steps=steps)  # type: ignore[list-item,arg-type]
        assert plan.compile is taken
    assert "taken" in [c.verdict for c in candidates]


def test_the_evidence_is_kept_and_shown(decision: tuple[kernels.KernelDecision, Path]) -> None:
    (file,) = [p for p in (decision[1] / "kernels").glob("*.json") if json.loads(p.read_text())["candidates"]][:1]
    assert file.exists()
    text = format_decision("optimized", decision[0])
    assert text.count("ms per step") == len(decision[0].candidates) and "taken" in text
