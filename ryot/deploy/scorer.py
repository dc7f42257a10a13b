"""The decoder in torch on a checkpoint's own arrays: what calibration watches and quantized graphs are held against."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ryot.deploy.mapped import stream_decoder
from ryot.deploy.weights import DecoderWeights
from ryot.models.tensors import FloatArray
from ryot.train.model import Cache


class TorchScorer:
    """Logits in float32 without a second copy of the weights, which a session of the float32 graph would hold."""

    def __init__(self, weights: DecoderWeights):
        self._model = stream_decoder(weights)

    @torch.no_grad()
    def run(self, ids_BS: NDArray[np.int64], past: Cache | None = None) -> tuple[FloatArray, Cache]:
        """Logits [B, S, V] of the new tokens and the grown cache."""
        logits, grown = self._model.forward_cached(torch.from_numpy(ids_BS), past)
        return logits.numpy(), grown
