"""The sizes of blocks that share a scale; nothing heavy is imported, so recipes can be checked by it."""

from __future__ import annotations

#: Block sizes that MatMulNBits and GatherBlockQuantized have kernels for.
BLOCK_SIZES = (16, 32, 64, 128, 256)


def block_size_for(num_inputs: int, wanted: int) -> int:
    """The largest block size up to `wanted` that divides `num_inputs`; `wanted` itself when none does.

    A block that does not divide is padded, which costs bytes and time.
    """
    fitting = [b for b in BLOCK_SIZES if b <= wanted and num_inputs % b == 0]
    return max(fitting, default=wanted)
