"""The last phase through int4's rounding: trained codes are the codes that are exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ryot.adaptation import RoundingConfig
from ryot.config import KernelPlan, VariantConfig, replace
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_variant
from ryot.deploy.matrices import BlockMatrix, quantize_blocks
from ryot.deploy.quantize import Quantizer
from ryot.deploy.settings import ExportSettings
from ryot.deploy.stored import stored_in_four_bits
from ryot.deploy.weights import load_decoder_weights
from ryot.models.sources.folder import open_folder
from ryot.models.sources.rounded import ROUNDING_NAME
from ryot.train.dataset import Dataset
from ryot.train.loop import Trainer, TrainJob
from ryot.train.rounding import round_blocks
from tests.conftest import tiny_variant


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(6, 64), (5, 40), (3, 128)])
def test_training_rounds_as_exports_do(bits: int, shape: tuple[int, int]) -> None:
    values = np.random.default_rng(bits).normal(size=shape).astype(np.float32)
    values[0, :32] = 0
    values[1, :4] = (1, -1, 1, -1)
    expected = quantize_blocks(values, bits=bits, block_size=32).dequantize()
    assert np.array_equal(round_blocks(torch.from_numpy(values), bits, 32).numpy(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_on_the_grid_stays_there(bits: int) -> None:
    values = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    once = quantize_blocks(values, bits=bits, block_size=32)
    again = quantize_blocks(once.dequantize(), bits=bits, block_size=32)
    assert np.array_equal(once.codes_NCE, again.codes_NCE)


@pytest.fixture(scope="module")
def variant() -> VariantConfig:
    return replace(tiny_variant("optimized", steps=24), rounding=RoundingConfig(share=0.5))


@pytest.fixture(scope="module")
def rounded(dataset: Dataset, variant: VariantConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded")
    trainer = Trainer(TrainJob(variant=variant, seed=0, dataset_dir=str(dataset.path)), KernelPlan())
    trainer.run_chunk(120)
    trainer.save(folder / "done")
    return folder / "done"


def test_the_exported_codes_are_those_that_were_trained(rounded: Path, dataset: Dataset, tmp_path: Path) -> None:
    checkpoint = open_folder(rounded)
    weights = load_decoder_weights(checkpoint)
    stored = stored_in_four_bits(checkpoint, weights.spec)
    assert stored is not None
    found = Quantizer(weights, dataset, ExportSettings(), 1.01, tmp_path, source=stored).quantize("int4")
    assert set(found.record["formats"].values()) == {"as stored"}
    for name, matrix in found.matrices.items():
        assert isinstance(matrix, BlockMatrix)
        assert matrix.bits == (8 if name == "embedding" else 4), name
        values = weights[f"{name}.weight"]
        assert np.allclose(matrix.dequantize(), values, rtol=1e-6, atol=0), name


def test_an_exported_artifact_is_as_good_as_its_float32(rounded: Path, dataset: Dataset, tmp_path: Path) -> None:
    [fp32, int4] = export_variant(
        open_folder(rounded), tmp_path, ["fp32", "int4"], dataset, options=ExportOptions(max_bpb_ratio=1.05)
    )
    # Weights are equal; what is left is the rounding of inputs to int8 by the operator.
    assert abs(int4.quality.bpb_ratio - 1) < 2e-3
    assert fp32.quality.bpb_ratio == 1.0


def test_weights_that_have_moved_are_not_taken_for_codes(rounded: Path, tmp_path: Path) -> None:
    import safetensors.torch

    folder = tmp_path / "moved"
    folder.mkdir()
    for file in (f for f in rounded.iterdir() if f.is_file()):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(
        {n: t + 1e-3 * torch.randn_like(t) for n, t in tensors.items()}, folder / "model.safetensors"
    )
    checkpoint = open_folder(folder)
    assert (folder / ROUNDING_NAME).exists()
    assert stored_in_four_bits(checkpoint, load_decoder_weights(checkpoint).spec) is None


def test_a_training_goes_on_bit_for_bit_through_the_rounded_phase(
    dataset: Dataset, variant: VariantConfig, tmp_path: Path
) -> None:
    job = TrainJob(variant=variant, seed=0, dataset_dir=str(dataset.path))
    whole = Trainer(job, KernelPlan())
    whole.run_chunk(60, max_steps=18)
    whole.save(tmp_path / "on-the-way")
    assert not (tmp_path / "on-the-way" / ROUNDING_NAME).exists()
    whole.run_chunk(60)
    second = Trainer.resume(job, KernelPlan(), tmp_path / "on-the-way")
    second.run_chunk(60)
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_gradients_are_those_of_the_rounded_weights_and_move_the_others(
    dataset: Dataset, variant: VariantConfig
) -> None:
    plain = replace(variant, train=dataclasses.replace(variant.train, normalize_embedding=False))
    trainer = Trainer(TrainJob(variant=plain, seed=0, dataset_dir=str(dataset.path)), KernelPlan())
    step, weight = trainer._take_step, trainer.model.get_parameter("layers.0.gate_up.weight")
    before = weight.detach().clone()
    with step.rounded(20):
        assert torch.equal(weight, round_blocks(before, 4, 32)) and not torch.equal(weight, before)
    assert torch.equal(weight, before)
    with step.rounded(2):
        assert torch.equal(weight, before), "the first phase is not rounded"
