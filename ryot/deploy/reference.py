"""Logits in plain arithmetic, a layer at a time: what exported graphs are held against.

    # B batch, T tokens, V vocabulary, E embedding dim

Only one layer's weights exist in the type that is computed in, so a large model in float64, or one whose weights are
dequantized from blocks, needs little more memory than it has already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ryot.models.spec import DecoderSpec, layer_shapes
from ryot.models.tensors import FloatArray
from ryot.train.model import Decoder, Layer, RotaryTables, without_memory

Load = Callable[[str], FloatArray]
"""An array by its name in `Decoder.state_dict()`."""

#: Values of the output matrix that are converted at a time.
HEAD_CHUNK_VALUES = 8_000_000


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [B, T] that follow those of the pieces before, and the weights that they are computed with."""

    ids_BT: NDArray[np.int64]
    load: Load


@torch.no_grad()
def layerwise_logits(spec: DecoderSpec, pieces: Sequence[Piece], dtype: torch.dtype) -> list[Tensor]:
    """Logits [B, T, V] of each piece in `dtype`; a piece sees the keys and values of those before it."""
    shell = _Shell(spec, dtype)
    starts = np.cumsum([0, *(piece.ids_BT.shape[1] for piece in pieces)]).tolist()
    streams = [shell.embed(piece, start) for piece, start in zip(pieces, starts)]
    for i in range(spec.num_layers):
        past: tuple[Tensor, Tensor] | None = None
        for number, piece in enumerate(pieces):
            streams[number], past = shell.layer(i, piece.load)(streams[number], shell.rotary, past)
    return [shell.logits(stream, piece.load) for stream, piece in zip(streams, pieces)]


def decoder_logits(model: Decoder, ids_BT: NDArray[np.int64], dtype: torch.dtype) -> Tensor:
    """Logits [B, T, V] of a torch decoder, computed in `dtype`."""
    return layerwise_logits(model.spec, [Piece(ids_BT, array_loader(model.state_dict()))], dtype)[0]


def array_loader(state: Mapping[str, Tensor]) -> Load:
    """The arrays of a `state_dict()` by name."""
    return lambda name: state[name].numpy()


class _Shell:
    """What a decoder has besides its layers' weights."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype):
        self._spec, self._dtype = spec, dtype
        self.rotary = RotaryTables(spec).to(dtype)
        with without_memory():
            self._decoder = Decoder(spec).eval()
        self._table = "embedding.weight" if spec.tie_embeddings else "head.weight"

    def layer(self, index: int, load: Load) -> Layer:
        """One layer with its weights in the type that is computed in; they go when it goes."""
        layer = copy.deepcopy(self._decoder.layers[index])
        assert isinstance(layer, Layer)
        names = layer_shapes(self._spec)
        layer.load_state_dict({name: self._tensor(load, f"layers.{index}.{name}") for name in names}, assign=True)
        return layer

    def embed(self, piece: Piece, start: int) -> Tensor:
        """The residual stream [B, T, D] of a piece that starts at this position."""
        ids = torch.from_numpy(piece.ids_BT)
        # Only the rows that are looked up.
        rows, places = torch.unique(ids, return_inverse=True)
        table = torch.from_numpy(np.ascontiguousarray(piece.load("embedding.weight")[rows.numpy()])).to(self._dtype)
        if self._spec.embedding_scale:
            scale = self._tensor(piece.load, "embedding_scale")
            self._decoder.embedding_scale = torch.nn.Parameter(scale, requires_grad=False)
        self._fill(piece.load, ("positions", "project_in"))
        return self._decoder.embed(places, table, start)

    def logits(self, x_BTD: Tensor, load: Load) -> Tensor:
        """Logits [B, T, V] of what the last layer gives."""
        self._fill(load, ("final_norm", "project_out"))
        x_BTE = self._decoder.finish(x_BTD)
        weights = load(self._table)
        rows = max(1, HEAD_CHUNK_VALUES // weights.shape[1])
        parts = [
            F.linear(x_BTE, torch.from_numpy(weights[start : start + rows]).to(self._dtype))
            for start in range(0, len(weights), rows)
        ]
        logits = torch.cat(parts, dim=-1)
        return logits + self._tensor(load, "head.bias") if self._spec.head_bias else logits

    def _fill(self, load: Load, modules: Sequence[str]) -> None:
        for name in modules:
            module = getattr(self._decoder, name)
            if module is not None:
                state = {part: self._tensor(load, f"{name}.{part}") for part in module.state_dict()}
                module.load_state_dict(state, assign=True)

    def _tensor(self, load: Load, name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(load(name))).to(self._dtype)
