"""The formats of a weight matrix in a graph: float32, dynamic int8, and blocks of 4 or 8 bits.

    # N output features, K input features, C blocks along K, E values of one block

A format knows its numbers and its size; `blocks.py` knows which operator multiplies with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ryot.models.block_sizes import block_size_for
from ryot.models.blocks import ByteArray, block_scales, encode_blocks, split_blocks
from ryot.models.tensors import FloatArray


@dataclass(frozen=True, slots=True)
class FloatMatrix:
    """Plain float32."""

    values_NK: FloatArray

    @property
    def num_bytes(self) -> int:
        return self.values_NK.nbytes

    def dequantize(self) -> FloatArray:
        """The values the runtime multiplies with, [N, K]."""
        return self.values_NK


@dataclass(frozen=True, slots=True)
class DynamicMatrix:
    """int8 with one scale for each output feature; inputs are rounded to uint8, token by token, as the graph runs."""

    codes_NK: NDArray[np.int8]
    scales_N: FloatArray

    @property
    def num_bytes(self) -> int:
        return self.codes_NK.nbytes + self.scales_N.nbytes

    def dequantize(self) -> FloatArray:
        """The values the runtime multiplies with, [N, K]."""
        return self.codes_NK.astype(np.float32) * self.scales_N[:, None]


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """4 or 8 bits; each block of input features has a scale and the code that stands for 0."""

    codes_NCE: ByteArray
    """One code a byte, not packed; values past K are the zero code."""
    scales_NC: FloatArray
    bits: int
    num_inputs: int
    zeros_NC: ByteArray | None = None
    """The zero code of each block; None where all are 2^(bits-1), which then is not stored."""

    @property
    def block_size(self) -> int:
        return int(self.codes_NCE.shape[2])

    @property
    def num_bytes(self) -> int:
        zeros = 0 if self.zeros_NC is None else len(self.zeros_NC) * (self.zeros_NC.shape[1] * self.bits + 7) // 8
        return self.codes_NCE.size * self.bits // 8 + self.scales_NC.nbytes + zeros

    def rows(self, which: slice) -> BlockMatrix:
        """Some of its output features."""
        zeros = None if self.zeros_NC is None else self.zeros_NC[which]
        return BlockMatrix(self.codes_NCE[which], self.scales_NC[which], self.bits, self.num_inputs, zeros)

    def packed(self) -> ByteArray:
        """Codes as the runtime stores them, [N, C, E * bits / 8]; of two 4-bit codes the first is the low half."""
        return self.codes_NCE if self.bits == 8 else _pack_pairs(self.codes_NCE)

    def packed_zeros(self) -> ByteArray | None:
        """Zero codes as the runtime stores them, [N, C * bits / 8] rounded up."""
        if self.zeros_NC is None or self.bits == 8:
            return self.zeros_NC
        return _pack_pairs(np.pad(self.zeros_NC, ((0, 0), (0, self.zeros_NC.shape[1] % 2))))

    def dequantize(self) -> FloatArray:
        """The values the runtime multiplies with, [N, K]."""
        zeros = 1 << (self.bits - 1) if self.zeros_NC is None else self.zeros_NC[..., None].astype(np.float32)
        values = self.codes_NCE.astype(np.float32)
        values -= zeros
        values *= self.scales_NC[..., None]
        return values.reshape(len(values), -1)[:, : self.num_inputs]


@dataclass(frozen=True, slots=True)
class OffsetBlockMatrix:
    """A block matrix and a number for each of its blocks that is added to all values of the block.

    The numbers are columns of the same product: they multiply the sums of the inputs' blocks, which stand behind the
    inputs. This is how blocks with a float minimum are held, for which the operator has no fast kernel.
    """

    blocks: BlockMatrix
    """[N, K], K a multiple of the block size."""
    offsets: BlockMatrix
    """[N, C], of the same bits and block size."""

    @property
    def num_bytes(self) -> int:
        return self.blocks.num_bytes + self.offsets.num_bytes

    def joined(self) -> BlockMatrix:
        """The matrix [N, K + C] of the product."""
        parts = (self.blocks, self.offsets)
        middle = 1 << (self.blocks.bits - 1)
        zeros = [np.full(p.scales_NC.shape, middle, np.uint8) if p.zeros_NC is None else p.zeros_NC for p in parts]
        return BlockMatrix(
            np.concatenate([p.codes_NCE for p in parts], axis=1),
            np.concatenate([p.scales_NC for p in parts], axis=1),
            self.blocks.bits,
            self.blocks.num_inputs + self.offsets.num_inputs,
            np.concatenate(zeros, axis=1),
        )

    def dequantize(self) -> FloatArray:
        """The values that inputs are multiplied with, [N, K]."""
        return self.blocks.dequantize() + np.repeat(self.offsets.dequantize(), self.blocks.block_size, axis=1)


Matrix = FloatMatrix | DynamicMatrix | BlockMatrix | OffsetBlockMatrix


def quantize_dynamic(values_NK: FloatArray, *, bits: int) -> DynamicMatrix:
    """Round to nearest, symmetric for each output feature.

    `bits` is 7 where the CPU adds two products of an unsigned and a signed byte in 16 bits with saturation (x86
    without VNNI): 255 * 64 * 2 fits, 255 * 127 * 2 does not. 8 elsewhere.
    """
    limit = (1 << (bits - 1)) - 1
    scales_N = np.abs(values_NK).max(axis=1) / np.float32(limit)
    scales_N = np.where(scales_N == 0, np.float32(1), scales_N).astype(np.float32)
    codes = np.clip(np.rint(values_NK / scales_N[:, None]), -limit, limit).astype(np.int8)
    return DynamicMatrix(codes, scales_N)


def _pack_pairs(codes: ByteArray) -> ByteArray:
    """Two 4-bit codes a byte along the last axis, the first in the low half."""
    return np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], 4), dtype=np.uint8)


def quantize_blocks(values_NK: FloatArray, *, bits: int, block_size: int) -> BlockMatrix:
    """Round to nearest in blocks of `block_size` inputs (or a smaller one that divides K)."""
    K = values_NK.shape[1]
    blocks = split_blocks(values_NK, block_size_for(K, block_size))
    scales = block_scales(blocks, bits)
    return BlockMatrix(encode_blocks(blocks, scales, bits), scales, bits, K)
