"""Elastic (Matryoshka) models: the first channels of every tensor are a narrower model of their own.

    # B batch, T tokens, V vocabulary, d width of the narrower model

A narrower model keeps whole heads: the first query heads and the kv heads that they read. Because heads, kv heads and
feed-forward width shrink in proportion to the width, the cut is again an ordinary model of the same architecture. The
method is Matryoshka representation learning (Kusupati et al. 2022, arXiv:2205.13147), which MatFormer (Devvrit et al.
2023, arXiv:2310.07707) applies to the feed-forward layers of a decoder; here it runs through the residual stream too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ryot.config import Attention, ModelConfig, narrow_config
from ryot.errors import ConfigError
from ryot.train.checkpoint import load_model, load_tokenizer, load_training_state, save_checkpoint
from ryot.train.model import Decoder


class NarrowModel:
    """The model of `width` inside a decoder: it computes with slices of the decoder's weights, not with copies."""

    def __init__(self, model: Decoder, width: int, attention: Attention):
        self.cfg = narrow_config(model.cfg, width)
        self._model = model
        # Only the computation is taken from it; its own weights are replaced in every call.
        self._shell = Decoder(self.cfg, attention).to(model.embedding.weight.device).train()
        self._shell.normalize_embedding = model.normalize_embedding

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V]; gradients go to the decoder that holds the weights."""
        weights = slice_state(self._model.cfg, self.cfg, dict(self._model.named_parameters()))
        logits: Tensor = torch.func.functional_call(self._shell, weights, (ids_BT,))
        return logits


def slice_state(cfg: ModelConfig, narrow: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a decoder of shape `cfg`, cut to shape `narrow` (see `narrow_config`)."""
    return {name: _cut(cfg, narrow, name, tensor) for name, tensor in state.items()}


def _cut(cfg: ModelConfig, narrow: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    d, f = narrow.dim, narrow.ff_dim
    layer = name.rpartition(".")[0]
    if layer.endswith("attn.qkv"):
        q, k, v = tensor.split((cfg.dim, cfg.kv_dim, cfg.kv_dim))
        rows = torch.cat((q[:d], k[: narrow.kv_dim], v[: narrow.kv_dim]))
    elif layer.endswith("gate_up"):
        gate, up = tensor.split((cfg.ff_dim, cfg.ff_dim))
        rows = torch.cat((gate[:f], up[:f]))
    elif layer in ("embedding", "positions", "head"):
        rows = tensor
    else:
        rows = tensor[: f if layer.endswith(".up") else d]
    if tensor.ndim == 1:
        return rows
    return rows[:, : f if layer.endswith(".down") else d]


def slice_checkpoint(checkpoint: Path, width: int, output: Path) -> ModelConfig:
    """Write the model of `width` inside `checkpoint` as a checkpoint of its own; returns its shape.

    It has no training state: it is to be exported, not trained further. Raises `ConfigError` for a width that the
    checkpoint was not trained for and `CheckpointError` for a checkpoint that cannot be read.
    """
    recipe = load_training_state(checkpoint)[0]["identity"]["variant"]["train"]
    widths = recipe.get("elastic_widths", [])
    if width not in widths:
        can_be = f"one of {sorted(widths)}" if widths else "none: this checkpoint was not trained to be cut"
        raise ConfigError(
            f"width: got {width}, expected {can_be}", hint="train with elastic_widths, as variants/elastic.toml does"
        )
    model = load_model(checkpoint)
    narrow = narrow_config(model.cfg, width)
    state = slice_state(model.cfg, narrow, {name: p.detach() for name, p in model.named_parameters()})
    if recipe["normalize_embedding"]:
        state["embedding.weight"] = F.rms_norm(state["embedding.weight"], (width,))
    save_checkpoint(
        output, cfg=narrow, state=state, tokenizer_json=load_tokenizer(checkpoint).to_str(pretty=True).encode()
    )
    return narrow
