"""Smoothing: the same function, with inputs that lose less when the runtime rounds them."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch

from ryot.deploy.calibration import measure_input_sizes
from ryot.deploy.precisions import quantize_matrices
from ryot.deploy.quality import evaluate_artifacts, quality_windows
from ryot.deploy.scorer import TorchScorer
from ryot.deploy.settings import ExportSettings
from ryot.deploy.smoothing import LARGEST_FACTOR, foldable, smooth
from ryot.deploy.standard import write_standard_graph
from ryot.deploy.verify import SAFETY, reference_logits
from ryot.deploy.weights import DecoderWeights
from ryot.train.checkpoint import build_decoder

from .conftest import CONFIGS, CONTEXT, random_decoder
from .specs import SPECS, random_weights


def decoder_with_outliers(cfg):
    """A random decoder whose norms make a few channels many times larger than the rest, and whose matrices undo it."""
    model = random_decoder(cfg)
    with torch.no_grad():
        for layer in model.layers:
            for norm, matrix in ((layer.attn_norm, layer.attn.qkv), (layer.ff_norm, layer.gate_up)):
                for channel in (3, 40):
                    norm.weight[channel] *= 50
                    matrix.weight[:, channel] /= 50
    return DecoderWeights(spec=cfg, arrays={name: t.numpy() for name, t in model.state_dict().items()})


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def weights(request):
    return decoder_with_outliers(dataclasses.replace(CONFIGS["llama"], tie_embeddings=request.param))


@pytest.fixture(scope="module")
def smoothed(weights, data):
    return smooth(weights, measure_input_sizes(weights, data.windows("train", 16, CONTEXT)[:, :-1]))


@torch.no_grad()
def test_the_decoder_computes_what_it_did(weights, smoothed, data):
    ids = torch.from_numpy(data.windows("test", 4, CONTEXT)[:, :-1])
    expected, found = (build_decoder(w.spec, w.arrays)(ids) for w in (weights, smoothed))
    # A few roundings of float32 on logits of order 1.
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert {f"{fold.matrix}.weight" for fold in foldable(weights.spec)} <= {
        name for name, array in weights.arrays.items() if (array != smoothed.arrays[name]).any()
    }


@pytest.mark.parametrize("precision", ["int8-dyn", "int8"])
def test_outlier_channels_cost_less(weights, smoothed, data, tmp_path, precision):
    windows = quality_windows(data, "test", CONTEXT, tokens=1000)
    kl = []
    for w in (weights, smoothed):
        folder = tmp_path / str(len(kl))
        folder.mkdir()
        graph = write_standard_graph(folder, w, quantize_matrices(w, precision, ExportSettings(int8_block_size=32)))
        kl.append(evaluate_artifacts(TorchScorer(weights), {"x": graph}, windows, data.byte_lengths)["x"].kl)
    assert kl[1] < 0.5 * kl[0]


def test_a_channel_that_is_never_used_keeps_a_bounded_factor(weights, data):
    sizes = measure_input_sizes(weights, data.windows("train", 2, CONTEXT)[:, :-1])
    sizes = {name: np.where(np.arange(len(size)) == 5, 0, size) for name, size in sizes.items()}
    found = smooth(weights, sizes)
    ratio = found["layers.0.attn.qkv.weight"][:, 5] / weights["layers.0.attn.qkv.weight"][:, 5]
    np.testing.assert_allclose(ratio, 1 / LARGEST_FACTOR, rtol=1e-5)


def test_a_second_set_of_weights_takes_no_memory(weights, data):
    sizes = measure_input_sizes(weights, data.windows("train", 2, CONTEXT)[:, :-1])
    tracemalloc.start()
    smoothed = smooth(weights, sizes)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Factors of inputs, and norms.
    assert held < 0.1 * sum(array.nbytes for array in weights.arrays.values())
    assert smoothed["layers.0.attn.qkv.weight"].shape == weights["layers.0.attn.qkv.weight"].shape


def test_norms_that_feed_the_residual_too_are_left_alone():
    assert foldable(CONFIGS["opt"]) == []


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_structure_computes_what_it_did(name):
    model, weights = random_weights(SPECS[name])
    ids = np.random.default_rng(0).integers(0, weights.spec.vocab_size, (2, 24))
    generator = np.random.default_rng(1)
    names = [*weights.linears, weights.head]
    sizes = {n: np.exp(generator.standard_normal(weights[f"{n}.weight"].shape[1])) for n in names}
    smoothed = smooth(weights, {n: s.astype(np.float32) for n, s in sizes.items()})
    expected, error = reference_logits(model, ids)
    found = build_decoder(smoothed.spec, smoothed.arrays)(torch.from_numpy(ids))
    np.testing.assert_allclose(found, expected, rtol=0, atol=SAFETY * error)
