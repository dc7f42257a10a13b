"""The weights of a checkpoint as numpy arrays, checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ryot.config import ModelConfig
from ryot.errors import ExportError
from ryot.train.checkpoint import load_weights, read_model_config
from ryot.train.hf import state_from_hf
from ryot.train.model import OPT_POSITION_OFFSET

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderWeights:
    """A decoder's shape and its float32 arrays under the names of `Decoder.state_dict()`, matrices [out, in]."""

    cfg: ModelConfig
    arrays: Mapping[str, FloatArray]

    def __getitem__(self, name: str) -> FloatArray:
        return self.arrays[name]

    @property
    def head(self) -> str:
        """Name of the output matrix; the embedding's when tied."""
        return "embedding" if self.cfg.tie_embeddings else "head"

    @property
    def linears(self) -> list[str]:
        """Names (without `.weight`) of the matrices that a matrix product uses, in the order they are used.

        A tied head is not among them: it is `embedding`.
        """
        ff = "gate_up" if self.cfg.architecture == "llama" else "up"
        names = [f"layers.{i}.{m}" for i in range(self.cfg.num_layers) for m in ("attn.qkv", "attn.out", ff, "down")]
        return names if self.cfg.tie_embeddings else [*names, "head"]


def expected_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every array that a decoder of this shape has."""
    D, F, V, QKV = cfg.dim, cfg.ff_dim, cfg.vocab_size, cfg.dim + 2 * cfg.kv_dim
    llama = cfg.architecture == "llama"
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (V, D)}
    if not llama:
        shapes["positions.weight"] = (cfg.max_seq_len + OPT_POSITION_OFFSET, D)
    matrices = {"attn.qkv": (QKV, D), "attn.out": (D, D), "down": (D, F)}
    matrices["gate_up" if llama else "up"] = (2 * F if llama else F, D)
    for i in range(cfg.num_layers):
        for name, shape in matrices.items():
            shapes[f"layers.{i}.{name}.weight"] = shape
            if not llama:
                shapes[f"layers.{i}.{name}.bias"] = shape[:1]
        for norm in ("attn_norm", "ff_norm"):
            for kind in ("weight",) if llama else ("weight", "bias"):
                shapes[f"layers.{i}.{norm}.{kind}"] = (D,)
    if llama:
        shapes["final_norm.weight"] = (D,)
    if not cfg.tie_embeddings:
        shapes["head.weight"] = (V, D)
    return shapes


def load_decoder_weights(checkpoint: Path) -> DecoderWeights:
    """Read `config.json` and `model.safetensors` of a checkpoint folder.

    Raises `CheckpointError` for an architecture or a tensor name that is not known, a head size that the runtime
    cannot take, and a file that is missing or cut short; `ExportError` for a shape that does not fit the config and for
    values that are not finite.
    """
    cfg = read_model_config(checkpoint)
    tensors = {name: torch.from_numpy(array) for name, array in load_weights(checkpoint).items()}
    state = state_from_hf(cfg, tensors, str(checkpoint))
    arrays = {name: tensor.float().numpy() for name, tensor in state.items()}
    check_arrays(cfg, arrays, str(checkpoint))
    return DecoderWeights(cfg=cfg, arrays=arrays)


def check_arrays(cfg: ModelConfig, arrays: Mapping[str, FloatArray], where: str) -> None:
    """Raise `ExportError` for a shape that does not fit `cfg` or a value that is not finite."""
    for name, shape in expected_shapes(cfg).items():
        array = arrays[name]
        if array.shape != shape:
            raise ExportError(f"{where}: {name} is {list(array.shape)}, expected {list(shape)} by config.json")
        bad = int(array.size - np.isfinite(array).sum())
        if bad:
            raise ExportError(
                f"{where}: {name} has {bad} values that are not finite (NaN or infinity) of {array.size}",
                hint="go back to an earlier checkpoint",
            )
