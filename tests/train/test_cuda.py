"""Training on a GPU, held against the same training on the CPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ryot.config import KernelPlan, VariantConfig, replace
from ryot.deploy.export import ExportOptions, export_variant
from ryot.models.sources.folder import open_folder
from ryot.optimize.kernels import choose_kernels
from ryot.train.corpus import Corpus
from ryot.train.dataset import Dataset, HeldOutText
from ryot.train.device import choose_device, place_kernels
from ryot.train.loop import Trainer, TrainJob
from ryot.train.parallel import Group, ShardedTrainer, join_group, leave_group
from tests.conftest import tiny_variant

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

GPU = KernelPlan(device="cuda", attention="sdpa", fused_optimizer=True)


def _train(variant: VariantConfig, dataset: Dataset, plan: KernelPlan) -> tuple[Trainer, list[float]]:
    """A whole training, and its held-out losses."""
    trainer = Trainer(TrainJob(variant=variant, seed=0, dataset_dir=str(dataset.path)), plan)
    events = trainer.run_chunk(600)
    return trainer, [e.loss for e in events if hasattr(e, "eval_wall_s")]


@pytest.mark.parametrize("recipe", ["baseline", "optimized"])
def test_losses_in_float32_are_those_of_the_cpu(dataset: Dataset, recipe: str) -> None:
    variant = tiny_variant(recipe)
    on_cpu, on_gpu = (_train(variant, dataset, replace(GPU, device=device))[1] for device in ("cpu", "cuda"))
    # Sums in another order are off by 2^-24 of each; steps make of that what they like, but 1e-3 nats is the loss
    # of a run that went another way.
    assert on_gpu == pytest.approx(on_cpu, abs=1e-3)
    assert on_gpu[-1] < on_gpu[0]


@pytest.mark.parametrize(("compiled", "parts"), [(False, 2), (True, 2), (True, 1)])
def test_losses_in_bf16_are_those_of_the_cpu(dataset: Dataset, compiled: bool, parts: int) -> None:
    variant = tiny_variant("optimized", gradient_accumulation_steps=parts)
    plan = replace(place_kernels(variant, "cuda", 1), compile=compiled)
    assert plan.dtype == "bf16"
    _, on_cpu = _train(variant, dataset, KernelPlan())
    _, on_gpu = _train(variant, dataset, plan)
    # A product in bf16 is off by 2^-9 at most, at random; of a loss of 5.4 that is 1e-2 if all of it went one way.
    assert on_gpu == pytest.approx(on_cpu, abs=1e-2)


def test_a_gpu_is_taken_by_itself_and_tuned_for(dataset: Dataset, tmp_path: Path) -> None:
    assert choose_device("auto") == "cuda"
    variant = tiny_variant("optimized")
    variant = replace(variant, kernels=place_kernels(variant, "cuda", 1))
    decision = choose_kernels(variant, dataset, tmp_path)
    assert decision.plan.device == "cuda"
    assert torch.cuda.get_device_name() in decision.cpu
    assert {c.plan.device for c in decision.candidates} == {"cuda"}


def test_a_training_goes_on_from_its_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    job = TrainJob(variant=tiny_variant("optimized"), seed=0, dataset_dir=str(dataset.path))
    whole, cut = Trainer(job, GPU), Trainer(job, GPU)
    whole.run_chunk(600)
    cut.run_chunk(600, max_steps=whole.num_steps // 2)
    cut.save(tmp_path / "checkpoint")
    resumed = Trainer.resume(job, GPU, tmp_path / "checkpoint")
    resumed.run_chunk(600)
    assert resumed.step == whole.step
    # Embedding rows get their gradients by atomic additions, in an order that no run repeats.
    assert resumed.evaluate("val", 16).loss == pytest.approx(whole.evaluate("val", 16).loss, abs=1e-3)


def test_a_group_of_one_rank_over_nccl_learns_what_one_process_learns(dataset: Dataset, tmp_path: Path) -> None:
    job = TrainJob(variant=tiny_variant("optimized"), seed=0, dataset_dir=str(dataset.path))
    alone = Trainer(job, GPU)
    alone.run_chunk(600)
    join_group(Group(rank=0, world_size=1, rendezvous=f"file://{tmp_path}/meet"), GPU, "127.0.0.1")
    try:
        assert torch.distributed.get_backend() == "nccl"
        member = ShardedTrainer(job, GPU)
        member.run_chunk(600)
    finally:
        leave_group()
    assert member.evaluate("val", 16).loss == pytest.approx(alone.evaluate("val", 16).loss, abs=1e-3)


def test_what_a_gpu_trained_is_exported_as_any_checkpoint(corpus: Corpus, dataset: Dataset, tmp_path: Path) -> None:
    variant = tiny_variant("optimized")
    trainer, _ = _train(variant, dataset, place_kernels(variant, "cuda", 1))
    trainer.save(tmp_path / "checkpoint")
    data = HeldOutText(corpus, dataset.tokenizer)
    options = ExportOptions(name="tiny", variant="optimized")
    checkpoint = open_folder(tmp_path / "checkpoint")
    [artifact] = export_variant(checkpoint, tmp_path / "artifacts", ["int8"], data, options=options)
    assert artifact.passed
