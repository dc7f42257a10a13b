"""Where a training is computed. No GPU is needed: what a step is like there is tried on the CPU."""

from __future__ import annotations

import pytest
import torch

from ryot.config import KernelPlan, replace, resolve_variant
from ryot.errors import ConfigError
from ryot.train.dataset import Dataset
from ryot.train.device import asked_device, choose_device, place_kernels
from ryot.train.loop import Trainer, TrainJob
from tests.conftest import tiny_variant


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_not_taken_by_itself() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"^device: got 'cuda', but torch sees no CUDA device here$") as error:
        choose_device("cuda")
    assert error.value.hint == "use --device cpu"


def test_a_recipe_that_names_a_gpu_does_not_go_without_unless_told_to() -> None:
    named = replace(resolve_variant("optimized", "reference"), kernels=KernelPlan(device="cuda", loss_chunk=128))
    assert [asked_device(named, asked) for asked in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    # What it says of its kernels was said for a GPU.
    assert place_kernels(named, "cuda", 2) == KernelPlan(device="cuda", loss_chunk=128, threads=2)


def test_on_a_gpu_steps_begin_with_bf16_and_fused_kernels_but_the_baselines() -> None:
    gpu = KernelPlan(device="cuda", threads=2, dtype="bf16", attention="sdpa", fused_optimizer=True)
    optimized, baseline = (resolve_variant(name, "reference") for name in ("optimized", "baseline"))
    assert place_kernels(optimized, "cuda", 2) == gpu
    assert place_kernels(optimized, "cpu", 2) == replace(optimized.kernels, threads=2)
    assert place_kernels(baseline, "cuda", 2) == replace(baseline.kernels, device="cuda", threads=2)


def test_the_kernels_of_a_gpu_learn_what_those_of_the_cpu_learn(dataset: Dataset) -> None:
    variant = tiny_variant("optimized", gradient_accumulation_steps=2)
    losses = []
    for plan in (place_kernels(variant, "cpu", 1), replace(place_kernels(variant, "cuda", 1), device="cpu")):
        trainer = Trainer(TrainJob(variant=variant, seed=0, dataset_dir=str(dataset.path)), plan)
        trainer.run_chunk(600)
        losses.append(trainer.evaluate("val", 16).loss)
    # A product in bf16 is off by 2^-9 at most, at random; of a loss of 5.4 that is 1e-2 if all of it went one way.
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)
    assert losses[0] != losses[1]
