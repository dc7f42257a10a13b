"""The plain export is a second opinion: onnx's own operators, torch's logits."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import torch

from ryot.deploy.plain import export_plain
from ryot.deploy.standard import StandardGraph
from ryot.train.checkpoint import load_model

from .conftest import VOCAB_SIZE
from .test_graph import LOGIT_TOLERANCE


def test_plain_export_gives_torchs_logits_with_every_past_length(checkpoint, tmp_path):
    model = load_model(checkpoint)
    path = export_plain(model, tmp_path / "plain.onnx")
    assert {n.domain for n in onnx.load(path, load_external_data=False).graph.node} == {""}
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 30))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).numpy()
    graph = StandardGraph(path)
    for edges in ([0, 30], [0, 1, 2, 3, 30], [0, 15, 16, 30]):
        past = None
        for start, end in itertools.pairwise(edges):
            logits, past = graph.run(ids[:, start:end], past)
            np.testing.assert_allclose(logits, expected[:, start:end], atol=LOGIT_TOLERANCE, rtol=0)
