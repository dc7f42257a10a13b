"""Graphs of every family's checkpoints, as transformers saves them, against transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ryot.deploy.graph import float_matrices
from ryot.deploy.standard import write_standard_graph
from ryot.deploy.weights import load_decoder_weights
from ryot.models.sources.folder import open_folder
from tests.models.checkpoints import CHECKPOINTS

#: Share of the largest logit that float32 in another order of sums may change: 1.5e-5 was seen.
TOLERANCE = 5e-5


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_logits_are_those_of_transformers(name: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = hf_checkpoint(name)
    weights = load_decoder_weights(open_folder(folder))
    graph = write_standard_graph(tmp_path, weights, float_matrices(weights))
    length = weights.spec.max_seq_len
    ids = np.random.default_rng(1).integers(0, weights.spec.vocab_size, (2, length))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    tolerance = TOLERANCE * float(np.abs(expected).max())
    whole, _ = graph.run(ids)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=tolerance)
    # Cached: a prompt, then a token at a time, past any window.
    first, past = graph.run(ids[:, : length - 3])
    steps = [first[:, -1:]]
    for position in range(length - 3, length):
        logits, past = graph.run(ids[:, position : position + 1], past)
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected[:, length - 4 :], rtol=0, atol=tolerance)
