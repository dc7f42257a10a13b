"""Logits a layer at a time: torch's own, with the weights of one layer in memory."""

from __future__ import annotations

import weakref

import numpy as np
import torch

from ryot.deploy.reference import Piece, layerwise_logits
from tests.deploy.specs import PLAIN, random_weights


def test_one_layers_weights_exist_at_a_time():
    model, weights = random_weights(PLAIN)
    ids_BT = np.random.default_rng(0).integers(0, PLAIN.vocab_size, (2, 9))
    handed_out: list[tuple[str, weakref.ref[np.ndarray]]] = []

    def load(name: str) -> np.ndarray:
        if name.startswith("layers."):
            layer = name.split(".")[1]
            assert {other for other, array in handed_out if array() is not None} <= {layer}
            array = weights[name].copy()
            handed_out.append((layer, weakref.ref(array)))
            return array
        return weights[name]

    # float32 is what the arrays have, so the layers share them.
    [found] = layerwise_logits(PLAIN, [Piece(ids_BT, load)], torch.float32)
    assert len({layer for layer, _ in handed_out}) == PLAIN.num_layers
    torch.testing.assert_close(found, model(torch.from_numpy(ids_BT)))
