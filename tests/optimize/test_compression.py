"""Cutting a checkpoint to a narrower width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ryot.config import replace
from ryot.errors import CheckpointError, ConfigError
from ryot.models.spec import narrow_spec
from ryot.optimize.compression import slice_checkpoint
from ryot.train.checkpoint import load_model, read_checkpoint_spec
from ryot.train.dataset import Dataset
from ryot.train.elastic import NarrowModel
from ryot.train.loop import Trainer, TrainJob
from tests.conftest import tiny_variant

WIDTHS = (16, 32)


def train(dataset: Dataset, path: Path, *widths: int) -> Trainer:
    """A short training of a model with a key-value head for every head, to be cut to `widths`."""
    variant = tiny_variant("optimized")
    model = replace(variant.model, num_kv_heads=variant.model.num_heads)
    variant = replace(variant, model=model, train=replace(variant.train, elastic_widths=widths))
    trainer = Trainer(TrainJob(variant=variant, seed=0, dataset_dir=str(dataset.path)), variant.kernels)
    trainer.run_chunk(60, 5)
    trainer.save(path)
    return trainer


def test_a_checkpoint_is_cut_to_each_width_that_was_trained(dataset: Dataset, tmp_path: Path) -> None:
    full = train(dataset, tmp_path / "full", *WIDTHS).model
    ids = torch.randint(full.spec.vocab_size, (2, 9))
    for width in WIDTHS:
        cfg = slice_checkpoint(tmp_path / "full", width, tmp_path / f"{width}")
        assert read_checkpoint_spec(tmp_path / f"{width}") == cfg == narrow_spec(full.spec, width)
        cut = load_model(tmp_path / f"{width}")
        with torch.no_grad():
            # Rows of the table are scaled once in training and twice in the cut: fp32 rounding.
            expected = NarrowModel(full, width, "sdpa")(ids)
            torch.testing.assert_close(cut(ids), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(CheckpointError, match=r"training/state\.json is missing"):
        slice_checkpoint(tmp_path / "16", 16, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_width_that_was_not_trained_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    train(dataset, tmp_path / "full", *WIDTHS)
    with pytest.raises(ConfigError, match=r"width: got 3, expected one of \[16, 32\]"):
        slice_checkpoint(tmp_path / "full", 3, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_that_was_not_trained_to_be_cut_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    train(dataset, tmp_path / "plain")
    with pytest.raises(ConfigError, match="was not trained to be cut"):
        slice_checkpoint(tmp_path / "plain", 16, tmp_path / "none")
    assert not (tmp_path / "none").exists()
