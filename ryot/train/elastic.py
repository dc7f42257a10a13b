"""Elastic (Matryoshka) models: the first channels of every tensor are a narrower model of their own.

    # B batch, T tokens, V vocabulary, d width of the narrower model

A narrower model keeps whole heads: the first query heads and the kv heads that they read. Because heads, kv heads and
feed-forward width shrink in proportion to the width, the cut is again an ordinary model of the same architecture. The
method is Matryoshka representation learning (Kusupati et al. 2022, arXiv:2205.13147), which MatFormer (Devvrit et al.
2023, arXiv:2310.07707) applies to the feed-forward layers of a decoder; here it runs through the residual stream too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ryot.config import Attention
from ryot.models.spec import DecoderSpec, narrow_spec
from ryot.train.model import Decoder


class NarrowModel:
    """The model of `width` inside a decoder: it computes with slices of the decoder's weights, not with copies."""

    def __init__(self, model: Decoder, width: int, attention: Attention):
        self.spec = narrow_spec(model.spec, width)
        self._model = model
        # Only the computation is taken from it; its own weights are replaced in every call.
        self._shell = Decoder(self.spec, attention).to(model.embedding.weight.device).train()
        self._shell.normalize_embedding = model.normalize_embedding

    def __call__(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; gradients go to the decoder that holds the weights. Documents do not see each other."""
        weights = slice_state(self._model.spec, self.spec, dict(self._model.named_parameters()))
        logits: Tensor = torch.func.functional_call(self._shell, weights, (ids_BT, documents_BT))
        return logits


def slice_state(spec: DecoderSpec, narrow: DecoderSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a decoder of shape `spec`, cut to shape `narrow` (see `narrow_spec`)."""
    return {name: _cut(spec, narrow, name, tensor) for name, tensor in state.items()}


def _cut(spec: DecoderSpec, narrow: DecoderSpec, name: str, tensor: Tensor) -> Tensor:
    d, f = narrow.dim, narrow.ff_dim
    layer = name.rpartition(".")[0]
    if layer.endswith("attn.qkv"):
        q, k, v = tensor.split((spec.q_dim, spec.kv_dim, spec.kv_dim))
        rows = torch.cat((q[:d], k[: narrow.kv_dim], v[: narrow.kv_dim]))
    elif layer.endswith("gate_up"):
        gate, up = tensor.split((spec.ff_dim, spec.ff_dim))
        rows = torch.cat((gate[:f], up[:f]))
    elif layer in ("embedding", "positions", "head"):
        rows = tensor
    else:
        rows = tensor[: f if layer.endswith(".up") else d]
    if tensor.ndim == 1:
        return rows
    return rows[:, : f if layer.endswith(".down") else d]
