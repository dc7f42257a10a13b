"""Weights that a source holds in blocks of few bits already, and what MatMulNBits can hold of them without rounding.

    # N output features, C blocks along K, E values of one block

A value is `code * scale + minimum`. MatMulNBits' is `(code - zero) * scale` with a whole zero code: the same where the
minimum is a whole multiple of the scale, which GGUF's symmetric types (Q4_0, Q5_0, Q8_0, Q6_K) are by construction and
its types with a float minimum (Q4_1, Q5_1, Q4_K, Q5_K) are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ryot.deploy.gptq import round_by_search
from ryot.deploy.matrices import BlockMatrix, OffsetBlockMatrix
from ryot.models.block_sizes import BLOCK_SIZES
from ryot.models.blocks import ByteArray
from ryot.models.registry import tensor_maps
from ryot.models.sources.checkpoint import Checkpoint, QuantBlocks
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import FloatArray


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """A matrix as its source holds it: `code * scale + minimum`."""

    codes_NCE: ByteArray
    scales_NC: FloatArray
    minimums_NC: FloatArray
    """The value of code 0."""

    def dequantize(self) -> FloatArray:
        """The values, [N, K]."""
        values = self.codes_NCE * self.scales_NC[..., None] + self.minimums_NC[..., None]
        return values.reshape(len(values), -1)


class BlockSource(Protocol):
    """A source that may hold matrices in blocks; `blocks` returns None for one that it holds otherwise."""

    def blocks(self, name: str) -> StoredBlocks | None: ...


def repack_with_offsets(stored: StoredBlocks) -> OffsetBlockMatrix | None:
    """Nearly the same values: codes and scales as stored, whole zero codes, and what those leave of minimums in 4 bits.

    Of SmolLM2-135M's Q4_1 this loses 2.0e-5 of the outputs' energy, where keeping the codes and rounding the minimum
    loses 5.2e-3, RTN with searched scales 3.3e-3, GPTQ 1.1e-3 and 8 bits 2.4e-5 (8 matrices, blocks of 32, 2026-11-27).
    None for more than 4 bits and for blocks that the operator does not have.
    """
    codes, scales = stored.codes_NCE, np.where(stored.scales_NC == 0, np.float32(1), stored.scales_NC)
    if codes.max(initial=0) > 15 or codes.shape[2] not in BLOCK_SIZES:
        return None
    codes = np.where((stored.scales_NC == 0)[..., None], np.uint8(0), codes)
    zeros = np.clip(np.rint(-stored.minimums_NC / scales), 0, 15)
    left_NC = (stored.minimums_NC + zeros * scales).astype(np.float32)
    size = codes.shape[2]
    blocks = BlockMatrix(codes, scales, 4, codes.shape[1] * size, zeros.astype(np.uint8))
    # Padded here: the product has one block size, even where a smaller one would divide C.
    padded = np.pad(left_NC, ((0, 0), (0, -left_NC.shape[1] % size)))
    offsets = round_by_search(padded, bits=4, block_size=size)
    return OffsetBlockMatrix(blocks, replace(offsets, num_inputs=left_NC.shape[1]))


def repack(stored: StoredBlocks) -> BlockMatrix | None:
    """The same values for MatMulNBits, at 4 bits if their codes allow; None where that would round.

    A zero code that all blocks have in the middle is not stored.
    """
    codes, scales = stored.codes_NCE, np.where(stored.scales_NC == 0, np.float32(1), stored.scales_NC)
    bits = 4 if codes.max(initial=0) < 16 else 8
    # Where the scale is 0 so are all values, and any code stands for 0.
    empty = stored.scales_NC == 0
    if codes.shape[2] not in BLOCK_SIZES or (empty & (stored.minimums_NC != 0)).any():
        return None
    whole = np.rint(-stored.minimums_NC / scales)
    if (whole * scales != -stored.minimums_NC).any() or whole.min(initial=0) < 0 or whole.max(initial=0) >= 1 << bits:
        return None
    middle = np.uint8(1 << (bits - 1))
    zero_codes = np.where(empty, middle, whole.astype(np.uint8))
    codes = np.where(empty[..., None], middle, codes)
    num_inputs = codes.shape[1] * codes.shape[2]
    return BlockMatrix(codes, scales, bits, num_inputs, None if (zero_codes == middle).all() else zero_codes)


class CheckpointBlocks:
    """A checkpoint's matrices in the blocks that its file holds, under the names of the decoder's matrices."""

    def __init__(self, checkpoint: Checkpoint, spec: DecoderSpec):
        self._checkpoint = checkpoint
        self._maps = {entry.name: entry for entry in tensor_maps(spec)}

    def blocks(self, name: str) -> StoredBlocks | None:
        """The blocks of one matrix; None where a part of it is held otherwise, or laid out otherwise."""
        entry = self._maps.get(f"{name}.weight")
        if entry is None or entry.layout != "rows":
            return None
        parts = [self._checkpoint.blocks(tensor) for tensor in entry.tensors]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts) or len({part.block_size for part in found}) > 1:
            return None
        stored = [take_blocks(part) for part in found]
        return StoredBlocks(
            np.concatenate([part.codes_NCE for part in stored]),
            np.concatenate([part.scales_NC for part in stored]),
            np.concatenate([part.minimums_NC for part in stored]),
        )


def stored_in_four_bits(checkpoint: Checkpoint, spec: DecoderSpec) -> CheckpointBlocks | None:
    """The blocks of a checkpoint most of whose matrices are in 4 bits already; None for any other."""
    source = CheckpointBlocks(checkpoint, spec)
    first = source.blocks("layers.0.attn.out")
    return source if first is not None and first.codes_NCE.max(initial=0) < 16 else None


def take_blocks(blocks: QuantBlocks) -> StoredBlocks:
    """The blocks of one tensor, a whole zero code told as the minimum that it makes."""
    codes_NCE = blocks.codes.reshape(len(blocks.codes), -1, blocks.block_size)
    if blocks.minimums is not None:
        return StoredBlocks(codes_NCE, blocks.scales, blocks.minimums)
    assert blocks.zero_points is not None
    return StoredBlocks(codes_NCE, blocks.scales, -blocks.zero_points.astype(np.float32) * blocks.scales)
