"""Weights that were trained through their rounding: a note beside them says how, and their codes are found again.

    rounding.json   {"model.layers.0.self_attn.q_proj.weight": [bits, block size], …}

The note stands in a file of its own, so that a folder which another program has trained on and saved lacks it; values
that are not on the grid are not taken for codes either.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ryot.errors import CheckpointError
from ryot.models.block_sizes import BLOCK_SIZES
from ryot.models.blocks import block_scales, encode_blocks, split_blocks
from ryot.models.sources.checkpoint import FloatArray, Json, QuantBlocks, Tensors

ROUNDING_NAME = "rounding.json"
#: Of a block's largest value: what float32 itself may change when a grid is found again.
_TOLERANCE = 1e-6


class RoundedTensors:
    """The tensors of a checkpoint, and the codes of those that were trained rounded."""

    def __init__(self, tensors: Tensors, formats: Mapping[str, Json], where: str):
        """Raises `CheckpointError` for a note that is not what ryot writes."""
        self._tensors = tensors
        self._formats: dict[str, tuple[int, int]] = {}
        for name, pair in formats.items():
            match pair:
                case [int(bits), int(size)] if bits in (4, 8) and size in BLOCK_SIZES:
                    self._formats[name] = (bits, size)
                case _:
                    raise CheckpointError(f"checkpoint {where}: {ROUNDING_NAME}: {name} is {pair}, expected [4, 32]")

    def names(self) -> list[str]:
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(name)

    def load(self, name: str) -> FloatArray:
        return self._tensors.load(name)

    def blocks(self, name: str) -> QuantBlocks | None:
        if name not in self._formats:
            return None
        bits, size = self._formats[name]
        values = self.load(name)
        if values.ndim != 2 or values.shape[1] % size:
            return None
        blocks = split_blocks(values, size)
        scales = block_scales(blocks, bits)
        codes = encode_blocks(blocks, scales, bits)
        zero = 1 << (bits - 1)
        found = (codes.astype(np.float32) - zero) * scales[..., None]
        if (np.abs(found - blocks).max(axis=-1) > _TOLERANCE * zero * np.abs(scales)).any():
            return None
        return QuantBlocks(
            bits=bits,
            block_size=size,
            codes=codes.reshape(values.shape),
            scales=scales,
            zero_points=np.full(scales.shape, zero, np.uint8),
            minimums=None,
        )
