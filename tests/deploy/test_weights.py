"""Checkpoints that cannot be exported are refused before anything is built."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_unscored
from ryot.deploy.weights import load_decoder_weights
from ryot.errors import BundleError, CheckpointError, ConfigError, ExportError
from ryot.models.sources.folder import open_folder
from ryot.models.spec import parameter_shapes
from ryot.train.checkpoint import load_model

from .conftest import CONTEXT

PROMPTS = np.zeros((1, CONTEXT), np.int64)


@pytest.fixture
def changed(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def export(checkpoint, tmp_path, precision="int8"):
    return export_unscored(
        open_folder(checkpoint), precision, tmp_path / "out" / "artifact", options=ExportOptions(), prompts=PROMPTS
    )


def change_tensors(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def change_config(checkpoint, **values):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_names_and_shapes_are_those_of_the_torch_decoder(checkpoint):
    state = load_model(checkpoint).state_dict()
    weights = load_decoder_weights(open_folder(checkpoint))
    assert parameter_shapes(weights.spec) == {name: tuple(t.shape) for name, t in state.items()}
    for name, tensor in state.items():
        np.testing.assert_array_equal(weights[name], tensor.numpy())


def test_nan_in_the_weights_is_refused(changed, tmp_path):
    def change(tensors):
        name = next(n for n in sorted(tensors) if "layers.1" in n and tensors[n].ndim == 2)
        tensors[name][3, 5] = torch.nan

    change_tensors(changed, change)
    with pytest.raises(CheckpointError, match=r"layers\.1\..* has 1 values that are not finite"):
        export(changed, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_weights_file_cut_short_is_refused(changed, tmp_path):
    path = changed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short"):
        export(changed, tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_unknown_tensor_is_refused(changed, tmp_path):
    change_tensors(changed, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    with pytest.raises(CheckpointError, match=r"q_norm\.weight is not part of a"):
        export(changed, tmp_path)


def test_an_unknown_architecture_is_refused(changed, tmp_path):
    change_config(changed, model_type="mamba")
    with pytest.raises(CheckpointError, match=r"model_type is 'mamba', expected one of .*llama.* opt"):
        export(changed, tmp_path)


def test_a_shape_that_does_not_fit_the_config_is_refused(changed, tmp_path):
    change_config(changed, vocab_size=400)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is \[384, 64\], expected \[400, 64\] by config"):
        export(changed, tmp_path)


def test_a_head_size_that_the_fused_operator_cannot_take_is_refused(changed, tmp_path):
    # 64 / 16 = 4, which the kernel takes for neither family.
    change_config(changed, num_attention_heads=16, num_key_value_heads=16, head_dim=4)
    with pytest.raises(CheckpointError, match=r"head_dim: got 4, expected a multiple of (16|8)"):
        export(changed, tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_unknown_precision_names_the_nearest(changed, tmp_path):
    with pytest.raises(ConfigError, match="'int9' is not known; did you mean 'int"):
        export(changed, tmp_path, "int9")


def test_an_onnxruntime_that_is_too_old_is_refused_before_any_work(changed, tmp_path, monkeypatch):
    # The one thing that cannot be had here is an old runtime: only its version is pretended.
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    with pytest.raises(BundleError, match=r"onnxruntime 1\.23\.2 is too old .* needs 1\.24"):
        export(changed, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_bundle_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "out" / "artifact").mkdir(parents=True)
    (tmp_path / "out" / "artifact" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is no bundle"):
        export(checkpoint, tmp_path)
    assert (tmp_path / "out" / "artifact" / "thesis.txt").read_text() == "mine"
