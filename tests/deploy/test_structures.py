"""Graphs of every structure that a spec can describe, against the torch decoder of the same spec.

The torch decoder is held against transformers, family by family, in tests/models.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnxruntime as ort
import pytest
import torch

from ryot.deploy.datafile import DataFile
from ryot.deploy.graph import build_graph, float_matrices
from ryot.deploy.precisions import serialize
from ryot.deploy.quantize import observe_kv_scales
from ryot.deploy.standard import StandardGraph, write_standard_graph
from ryot.deploy.verify import SAFETY, reference_logits
from ryot.edge.bundle import DATA_NAME
from ryot.models.spec import parameter_shapes

from .specs import CONTEXT, SPECS, random_weights


@pytest.fixture(scope="module", params=sorted(SPECS))
def case(request, tmp_path_factory):
    model, weights = random_weights(SPECS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    return model, write_standard_graph(folder, weights, float_matrices(weights))


def run(graph: StandardGraph, ids, edges) -> np.ndarray:
    past, parts = None, []
    for start, end in itertools.pairwise(edges):
        logits, past = graph.run(ids[:, start:end], past)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


# Whole, then step by step from a short and from a long past, then in pieces.
@pytest.mark.parametrize(
    ("rows", "edges"),
    [
        (2, [0, CONTEXT]),
        (2, [0, 1, 2, 3, 4]),
        (2, [0, 40, 41, 42, 43]),
        (1, [0, 7, 30, 31, CONTEXT]),
    ],
)
def test_logits_are_those_of_the_torch_decoder(case, rows, edges):
    model, graph = case
    ids = np.random.default_rng(1).integers(0, model.spec.vocab_size, (rows, edges[-1]))
    expected, torch_error = reference_logits(model, ids)
    assert np.abs(expected).max() > 0.5  # logits that say something
    np.testing.assert_allclose(run(graph, ids, edges), expected, rtol=0, atol=SAFETY * torch_error)


def last_logits(folder, weights, kv_scales, ids, edges) -> np.ndarray:
    """Of the fast graph, given the tokens in pieces."""
    folder.mkdir()
    with DataFile(folder / DATA_NAME) as data:
        model = build_graph("fast", weights, float_matrices(weights), data, kv_scales=kv_scales)
    (folder / "model.onnx").write_bytes(serialize(model))
    graph = ort.InferenceSession(folder / "model.onnx")
    inputs, spec = {i.name for i in graph.get_inputs()}, weights.spec
    shape, dtype = (1, spec.num_kv_heads, 0, spec.head_dim), np.float32 if kv_scales is None else np.int8
    past = {name: np.zeros(shape, dtype) for name in inputs if name.startswith("past_key_values")}
    for start, end in itertools.pairwise(edges):
        feed = {"input_ids": ids[:, start:end], "seqlens_k": np.array([end - 1], np.int32), **past}
        feed |= {"total_sequence_length": np.array(end, np.int32), "position_ids": np.arange(start, end)[None]}
        found = dict(
            zip(
                [o.name for o in graph.get_outputs()],
                graph.run(None, {name: value for name, value in feed.items() if name in inputs}),
                strict=True,
            )
        )
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return found["logits"]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_piece_of_a_prompt_attends_to_an_int8_cache_as_steps_do(name, tmp_path):
    model, weights = random_weights(SPECS[name])
    ids = np.random.default_rng(1).integers(0, model.spec.vocab_size, (1, CONTEXT))
    scales = observe_kv_scales(write_standard_graph(tmp_path, weights, float_matrices(weights)), ids)
    if model.spec.head_dim % 16:  # as the operator wants it of channels
        scales = scales.per_tensor()
    edges = {"whole": [0, CONTEXT], "pieces": [0, 20, 57, CONTEXT], "steps": range(CONTEXT + 1)}
    found = {how: last_logits(tmp_path / how, weights, scales, ids, edges[how]) for how in edges}
    error = np.abs(last_logits(tmp_path / "exact", weights, None, ids, edges["whole"]) - found["steps"]).max()
    assert error > 0
    # Sums differ in their last digits, so that now and then a key is rounded to the next code.
    for how in ("whole", "pieces"):
        assert np.abs(found[how] - found["steps"]).max() < 0.5 * error


@pytest.mark.parametrize("name", sorted(SPECS))
def test_stated_parameters_are_those_of_the_model(name):
    model, _ = random_weights(SPECS[name])
    assert parameter_shapes(SPECS[name]) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == SPECS[name].num_parameters


def test_a_window_hides_what_lies_behind_it(tmp_path):
    model, weights = random_weights(SPECS["windows"])
    graph = write_standard_graph(tmp_path, weights, float_matrices(weights))
    ids = np.random.default_rng(2).integers(0, 200, (1, CONTEXT))
    # Three layers of 5 tokens reach back 12 positions and no further.
    changed = ids.copy()
    changed[0, CONTEXT - 14] = (changed[0, CONTEXT - 14] + 1) % 200
    for logits in (lambda x: graph.run(x)[0], lambda x: model(torch.from_numpy(x)).numpy()):
        before, after = logits(ids)[0, -1], logits(changed)[0, -1]
        np.testing.assert_array_equal(before, after)
    changed[0, CONTEXT - 13] = (changed[0, CONTEXT - 13] + 1) % 200
    assert not np.array_equal(graph.run(ids)[0][0, -1], graph.run(changed)[0][0, -1])
