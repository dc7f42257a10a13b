"""Narrower models inside a decoder: what is trained, what is cut out, and what that becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ryot.config import KernelPlan, ModelConfig, VariantConfig, replace
from ryot.errors import ConfigError
from ryot.train.batch import Batch
from ryot.train.dataset import Batches, Dataset
from ryot.train.elastic import NarrowModel, slice_state
from ryot.train.loop import Trainer, TrainJob
from ryot.train.model import Decoder
from ryot.train.step import TrainStep
from tests.conftest import CONTEXT, tiny_variant


def elastic(name: str, *widths: int) -> VariantConfig:
    variant = tiny_variant(name)
    model = replace(variant.model, num_kv_heads=variant.model.num_heads)
    return replace(variant, model=model, train=replace(variant.train, elastic_widths=widths))


def widths_of(cfg: ModelConfig) -> list[int]:
    return [cfg.dim * k // cfg.num_heads for k in range(1, cfg.num_heads)]


@pytest.mark.parametrize("name", ["baseline", "optimized"])
def test_a_view_computes_what_the_model_cut_out_computes(name: str) -> None:
    variant = elastic(name)
    torch.manual_seed(1)
    full = Decoder(variant.model.spec)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.normal_(std=0.3)
    ids = torch.randint(variant.model.vocab_size, (2, 9))
    for width in widths_of(variant.model):
        view = NarrowModel(full, width, "explicit")
        alone = Decoder(view.spec)
        alone.load_state_dict(slice_state(full.spec, view.spec, dict(full.named_parameters())))
        # Two orders of the same sums in fp32, some 100 terms of size 1.
        torch.testing.assert_close(view(ids), alone(ids), atol=1e-4, rtol=1e-4)
        assert alone.spec.head_dim == full.spec.head_dim


@pytest.mark.parametrize("name", ["baseline", "optimized"])
def test_gradients_reach_the_kept_channels_and_no_others(name: str) -> None:
    variant = elastic(name)
    full = Decoder(variant.model.spec)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.normal_(std=0.3)
    [width, *_] = widths_of(variant.model)
    ids = torch.randint(variant.model.vocab_size, (2, 9))
    NarrowModel(full, width, "sdpa")(ids).logsumexp(-1).sum().backward()
    table = full.embedding.weight.grad
    assert table is not None
    assert table[:, :width].abs().sum() > 0
    assert table[:, width:].abs().sum() == 0


def test_a_view_keeps_packed_documents_apart() -> None:
    variant = replace(elastic("optimized"), kernels=KernelPlan())
    torch.manual_seed(1)
    full = Decoder(variant.model.spec)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.normal_(std=0.3)
    view = NarrowModel(full, widths_of(variant.model)[0], "sdpa")
    ids = torch.randint(variant.model.vocab_size, (2, 9))
    targets = ids.roll(-1, 1)
    targets[:, 3] = -100
    documents = torch.tensor([[0] * 4 + [1] * 5] * 2)
    step = TrainStep(variant, variant.kernels)
    with torch.no_grad():
        packed = step.narrow_loss(view, Batch(ids, targets, documents))
        apart = [
            F.cross_entropy(view(ids[:, part])[:, :3].flatten(0, 1), targets[:, part][:, :3].flatten(), reduction="sum")
            for part in (slice(0, 4), slice(4, 9))
        ]
        last = F.cross_entropy(view(ids[:, 4:])[:, 3:].flatten(0, 1), targets[:, 7:].flatten(), reduction="sum")
    # Sums of some 100 terms in fp32.
    torch.testing.assert_close(packed, (sum(apart) + last) / 16, atol=1e-5, rtol=1e-5)


def test_each_step_trains_the_full_model_and_one_narrower_one_in_turn(dataset: Dataset) -> None:
    variant = elastic("optimized")
    widths = widths_of(variant.model)[:2]
    variant = replace(variant, train=replace(variant.train, elastic_widths=tuple(widths)))
    batches = Batches(dataset, length=CONTEXT, batch_size=variant.train.batch_size, seed=0)
    step = TrainStep(variant, variant.kernels)
    model = step.model
    for turn in range(3):
        inputs, targets = batches.batch(turn)
        narrow = NarrowModel(model, widths[turn % 2], "sdpa")
        both = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        both = both + F.cross_entropy(narrow(inputs).flatten(0, 1), targets.flatten())
        expected = torch.autograd.grad(both, list(model.parameters()))
        norm = torch.stack([g.norm() for g in expected]).norm().item()
        _, got = step(inputs, targets, 0.0, turn)
        # The same gradients from two backward passes or from one: fp32 rounding.
        assert got == pytest.approx(norm, rel=1e-4)


def test_an_elastic_training_resumes_bit_identical(dataset: Dataset, tmp_path: Path) -> None:
    variant = elastic("optimized")
    variant = replace(variant, train=replace(variant.train, elastic_widths=tuple(widths_of(variant.model)[:2])))
    job = TrainJob(variant=variant, seed=0, dataset_dir=str(dataset.path))
    whole, stopped = Trainer(job, variant.kernels), Trainer(job, variant.kernels)
    whole.run_chunk(60)
    stopped.run_chunk(60, 5)
    stopped.save(tmp_path / "half")
    resumed = Trainer.resume(job, variant.kernels, tmp_path / "half")
    resumed.run_chunk(60)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters()))


def test_a_width_that_leaves_no_whole_heads_is_refused_when_the_recipe_is_read() -> None:
    variant = tiny_variant("optimized")
    with pytest.raises(ConfigError, match="width: got 7"):
        replace(variant, train=replace(variant.train, elastic_widths=(7,)))
