"""How values are rounded to nearest in blocks of 4 or 8 bits: the rule that exports and trainings share.

    # N output features, K input features, C blocks along K, E values of one block

A value is `(code - 2^(bits-1)) * scale`. Values on the grid of a block are rounded to themselves, because its largest
one has a code of its own from which the scale is found again (`ryot.train.rounding` counts on it).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ryot.models.tensors import FloatArray

ByteArray = NDArray[np.uint8]


def split_blocks(values_NK: FloatArray, block_size: int) -> FloatArray:
    """[N, K] as [N, C, E], zeros after the end."""
    N, K = values_NK.shape
    C = -(-K // block_size)
    padded = np.pad(values_NK, ((0, 0), (0, C * block_size - K))) if K % block_size else values_NK
    return padded.reshape(N, C, block_size)


def block_scales(blocks: FloatArray, bits: int) -> FloatArray:
    """One scale for each block (the last axis). At 4 bits the value of largest size gets the code -8 exactly."""
    zero = 1 << (bits - 1)
    if bits == 8:
        scales = np.abs(blocks).max(axis=-1) / np.float32(zero - 1)
    else:
        index = np.abs(blocks).argmax(axis=-1, keepdims=True)
        scales = np.take_along_axis(blocks, index, axis=-1)[..., 0] / np.float32(-zero)
    return np.where(scales == 0, np.float32(1), scales).astype(np.float32)


def encode_blocks(blocks: FloatArray, scales: FloatArray, bits: int) -> ByteArray:
    """Codes nearest to `blocks` under the given scales."""
    zero = 1 << (bits - 1)
    codes: ByteArray = np.clip(np.rint(blocks / scales[..., None]) + zero, 0, 2 * zero - 1).astype(np.uint8)
    return codes
