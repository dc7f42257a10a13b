"""A checkpoint as every source gives it: Hugging Face's config, names and tokenizer files, weights read one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]
#: What JSON holds.
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

#: The files beside the weights that a tokenizer is made of; the first is enough to encode and decode.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantBlocks:
    """A matrix as its file holds it: one scale for each run of `block_size` inputs of an output.

    A weight is (code - zero point) x scale, or code x scale + minimum; exactly one of the last two is there.
    codes [out, in] uint8; scales, zero_points, minimums [out, in / block_size].
    """

    bits: int
    block_size: int
    codes: NDArray[np.uint8]
    scales: FloatArray
    zero_points: NDArray[np.uint8] | None
    minimums: FloatArray | None

    def dequantize(self) -> FloatArray:
        rows, cols = self.codes.shape
        values = self.codes.reshape(rows, -1, self.block_size).astype(np.float32)
        if self.zero_points is not None:
            values -= self.zero_points[..., None]
        values *= self.scales[..., None]
        if self.minimums is not None:
            values += self.minimums[..., None]
        return values.reshape(rows, cols)


class Tensors(Protocol):
    """The weights of a checkpoint under Hugging Face's names; each is read from disk when it is asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """How the file holds it: "F32", "BF16", "Q4_1", "GPTQ"."""
        ...

    def load(self, name: str) -> FloatArray:
        """The tensor as float32, in memory of its own. Raises `CheckpointError` for a file that changed or a kind
        that holds no weights."""
        ...

    def blocks(self, name: str) -> QuantBlocks | None:
        """The original codes of a matrix that is quantized already, where MatMulNBits could hold them; else None."""
        ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model, whatever it was stored as.

    `where` names it in messages. `files` are the tokenizer's, by name. `revision` is the hub's commit, where it came
    from there.
    """

    where: str
    kind: str
    config: Mapping[str, Json]
    generation_config: Mapping[str, Json]
    files: Mapping[str, bytes]
    tensors: Tensors
    digest: Callable[[], str]
    revision: str | None = None

    @property
    def sha256(self) -> str:
        """Of what was read, file by file; the same wherever it lies. Reads all of it, at first."""
        return self.digest()

    def names(self) -> list[str]:
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(name)

    def dtype(self, name: str) -> str:
        return self.tensors.dtype(name)

    def load(self, name: str) -> FloatArray:
        return self.tensors.load(name)

    def blocks(self, name: str) -> QuantBlocks | None:
        return self.tensors.blocks(name)

    def float_bytes(self) -> int:
        """Bytes of all weights as float32."""
        return sum(4 * int(np.prod(self.shape(name), dtype=np.int64)) for name in self.names())
