"""The angles of rotary positions: `position * frequency` for each pair of channels."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ryot.models.rotary import Rotary

Frequencies = NDArray[np.float64]


def rotary_frequencies(rotary: Rotary) -> Frequencies:
    """Radians per position, [dim / 2]."""
    half = rotary.dim // 2
    plain = rotary.theta ** (-np.arange(half, dtype=np.float64) / half)
    match rotary.scaling:
        case "linear":
            return plain / rotary.factor
        case "llama3":
            return _llama3(rotary, plain)
        case "yarn":
            return _yarn(rotary, plain)
        case "longrope":
            return plain / np.array(rotary.short_factors, np.float64)
        case _:
            return plain


def rotary_tables(rotary: Rotary, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines [length, dim / 2] of the angles at positions 0 to `length` - 1."""
    angles = np.outer(np.arange(length, dtype=np.float64), rotary_frequencies(rotary))
    cos, sin = np.cos(angles), np.sin(angles)
    if rotary.magnitude != 1.0:
        cos, sin = cos * rotary.magnitude, sin * rotary.magnitude
    return cos.astype(np.float32), sin.astype(np.float32)


def _llama3(rotary: Rotary, plain: Frequencies) -> Frequencies:
    turns = rotary.original_max_seq_len * plain / (2 * math.pi)
    blend = np.clip((turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor), 0, 1)
    return (1 - blend) * plain / rotary.factor + blend * plain


def _yarn(rotary: Rotary, plain: Frequencies) -> Frequencies:
    def dimension(turns: float) -> float:
        return rotary.dim * math.log(rotary.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    ramp: Frequencies = np.clip((np.arange(rotary.dim // 2) - low) / ((high - low) or 1e-3), 0, 1)
    return plain / rotary.factor * ramp + plain * (1 - ramp)
