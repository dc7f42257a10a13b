"""Moves the unevenness of a matrix's inputs into its weights, where a factor a channel costs nothing.

    # N output features, K input features

At `accuracy_level` 4 the runtime rounds inputs to int8 block by block, and `int8-dyn` a whole call at once: a channel
that is far larger than its neighbours takes their bits. Dividing channel k of the inputs by s_k and multiplying the
matrix's column by it changes no result, and the division is folded into what makes the inputs: the norm before the
matrix, or the rows of `up` before `down` (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, with both sides' typical
sizes where that takes the largest ones: single tokens of trained models have channels of a thousand times the rest).

On SmolLM2-135M, blocks of 32, 7 layers (2026-11-26), energy of the outputs' error by rounded inputs and by rounded
8-bit weights, against none: `qkv` 0.13 and 0.57, `gate_up` 0.31 and 0.81, `down` 0.61 and 0.84. A random rotation of
the same inputs gave 0.26 and 0.92, and 0.40 and 0.97, and is not free where the head is tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ryot.config import ModelConfig
from ryot.deploy.weights import DecoderWeights, FloatArray

#: A channel's factor is (size of inputs / size of weights) to this power, by what makes the inputs.
NORM_POWER, UP_POWER = 0.5, 0.35
#: Factors stay within this of their median: a channel that is never used has no size.
LARGEST_FACTOR = 64.0


@dataclass(frozen=True, slots=True)
class Fold:
    """A matrix whose inputs may be scaled, and the arrays that the inverse is folded into."""

    matrix: str
    makers: tuple[str, ...]
    """Arrays whose last K rows make the inputs."""
    power: float


def foldable(cfg: ModelConfig) -> list[Fold]:
    """The matrices whose inputs come straight from a norm or from a product with `up`, and go nowhere else."""
    if cfg.architecture != "llama":  # norms after the sum feed the residual too, and GELU is not linear
        return []
    folds = []
    for i in range(cfg.num_layers):
        folds.append(Fold(f"layers.{i}.attn.qkv", (f"layers.{i}.attn_norm.weight",), NORM_POWER))
        folds.append(Fold(f"layers.{i}.gate_up", (f"layers.{i}.ff_norm.weight",), NORM_POWER))
        folds.append(Fold(f"layers.{i}.down", (f"layers.{i}.gate_up.weight",), UP_POWER))
    if not cfg.tie_embeddings:
        folds.append(Fold("head", ("final_norm.weight",), NORM_POWER))
    return folds


def smooth(weights: DecoderWeights, input_sizes: Mapping[str, FloatArray]) -> DecoderWeights:
    """The same decoder with even inputs; `input_sizes` [K] are mean absolute values by matrix."""
    arrays = dict(weights.arrays)
    for fold in foldable(weights.cfg):
        name = f"{fold.matrix}.weight"
        sizes_K = np.sqrt(np.square(arrays[name]).mean(axis=0))
        factors_K = _factors(input_sizes[fold.matrix], sizes_K, fold.power)
        arrays[name] = arrays[name] * factors_K
        for maker in fold.makers:
            made = arrays[maker].copy()
            rows = made[-len(factors_K) :]
            rows /= factors_K if made.ndim == 1 else factors_K[:, None]
            arrays[maker] = made
    return DecoderWeights(cfg=weights.cfg, arrays=arrays)


def _factors(input_sizes_K: FloatArray, weight_sizes_K: FloatArray, power: float) -> FloatArray:
    tiny = np.float32(1e-12)
    factors = ((input_sizes_K + tiny) / (weight_sizes_K + tiny)) ** np.float32(power)
    factors /= np.median(factors)
    return np.clip(factors, 1 / LARGEST_FACTOR, LARGEST_FACTOR).astype(np.float32)
