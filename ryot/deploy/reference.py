"""The decoder in torch on a checkpoint's own arrays: what calibration watches and quantized graphs are held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ryot.deploy.weights import DecoderWeights, FloatArray
from ryot.train.model import Decoder


def share_decoder(weights: DecoderWeights) -> Decoder:
    """A torch decoder for inference whose parameters are the arrays of `weights` themselves, not copies."""
    model = Decoder(weights.cfg)
    model.load_state_dict({name: torch.from_numpy(a) for name, a in weights.arrays.items()}, assign=True)
    return model.eval().requires_grad_(False)


class TorchScorer:
    """Logits in float32 without a second copy of the weights, which a session of the float32 graph would hold."""

    def __init__(self, weights: DecoderWeights):
        self._model = share_decoder(weights)

    @torch.no_grad()
    def run(self, ids_BS: NDArray[np.int64], past: Any = None) -> tuple[FloatArray, Any]:
        """Logits [B, S, V] of the new tokens and the grown cache."""
        logits, grown = self._model.forward_cached(torch.from_numpy(ids_BS), past)
        return logits.numpy(), grown
