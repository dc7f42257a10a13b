"""A GGUF file as a checkpoint of Hugging Face's layout."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from ryot.errors import CheckpointError
from ryot.models.sources.checkpoint import Checkpoint, FloatArray, QuantBlocks
from ryot.models.sources.gguf_config import config_from_metadata, find_family
from ryot.models.sources.gguf_families import Family, Storing, row_order
from ryot.models.sources.gguf_file import GgufFile
from ryot.models.sources.gguf_tokenizer import tokenizer_from_metadata

#: Tensors that say how positions turn; config.json says it in words.
_POSITIONS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


class GgufTensors:
    """The tensors of a GGUF file under Hugging Face's names, in Hugging Face's order of rows."""

    def __init__(self, file: GgufFile, family: Family):
        """Raises `CheckpointError` for a tensor that the family does not know."""
        self._file = file
        arch = family.gguf
        self._heads = _count(file, f"{arch}.attention.head_count")
        self._kv_heads = _count(file, f"{arch}.attention.head_count_kv", self._heads)
        names = family.names(_count(file, f"{arch}.block_count"))
        self._stored = {hf: entry for hf, entry in names.items() if entry[0] in file.tensors}
        known = {stored for stored, _ in self._stored.values()} | _POSITIONS
        if extra := sorted(file.tensors.keys() - known):
            raise CheckpointError(
                f"checkpoint {file.path}: tensor {extra[0]} is not part of {arch} as it is known here"
                + (f" (and {len(extra) - 1} more)" if len(extra) > 1 else "")
            )

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, storing = self._stored[name]
        shape = self._file.tensors[stored].shape
        return shape[::-1] if storing is Storing.TRANSPOSED else shape

    def dtype(self, name: str) -> str:
        return self._file.tensors[self._stored[name][0]].kind.name

    def load(self, name: str) -> FloatArray:
        stored, storing = self._stored[name]
        raw = self._file.rows(stored)
        if len(self.shape(name)) == 1:
            # One row of bytes; only whole kinds (F32, F16) come in vectors, so values can move by themselves.
            raw = raw.reshape(self.shape(name)[0], -1)
        order = row_order(storing, len(raw), self._heads, self._kv_heads)
        values = self._file.dequantize(stored, raw if order is None else raw[order])
        if storing is Storing.LESS_ONE:
            values -= 1.0
        return np.ascontiguousarray(values.T) if storing is Storing.TRANSPOSED else values

    def blocks(self, name: str) -> QuantBlocks | None:
        stored, storing = self._stored[name]
        kind = self._file.tensors[stored].kind
        if kind not in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0) or storing is Storing.TRANSPOSED:
            return None
        raw = self._file.rows(stored)
        order = row_order(storing, len(raw), self._heads, self._kv_heads)
        return split_blocks(raw if order is None else raw[order], kind)


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file. Raises `CheckpointError` in one line for whatever cannot be read."""
    file = GgufFile(path)
    family = find_family(file)
    config = config_from_metadata(file, family)
    tokenizer = tokenizer_from_metadata(file)
    config |= tokenizer.config_ids

    @cache
    def digest() -> str:
        with path.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()

    return Checkpoint(
        where=str(path),
        kind="gguf",
        config=config,
        generation_config=tokenizer.generation_config,
        files=tokenizer.files,
        tensors=GgufTensors(file, family),
        digest=digest,
    )


def split_blocks(raw: NDArray[np.uint8], kind: Kind) -> QuantBlocks:
    """ggml's blocks of 32: a float16 scale, for Q4_1 a float16 minimum, then codes; 4-bit codes j and j + 16 share a
    byte, the first in its lower half."""
    head = 4 if kind is Kind.Q4_1 else 2
    size = head + (32 if kind is Kind.Q8_0 else 16)
    blocks = raw.reshape(len(raw), -1, size)
    halves = np.ascontiguousarray(blocks[..., :head]).view(np.float16).astype(np.float32)
    packed = blocks[..., head:]
    if kind is Kind.Q8_0:
        codes = packed ^ np.uint8(0x80)
    else:
        codes = np.concatenate([packed & np.uint8(0x0F), packed >> np.uint8(4)], axis=-1)
    zero_points = None if kind is Kind.Q4_1 else np.full(halves.shape[:2], 128 if kind is Kind.Q8_0 else 8, np.uint8)
    return QuantBlocks(
        bits=8 if kind is Kind.Q8_0 else 4,
        block_size=32,
        codes=codes.reshape(len(raw), -1),
        scales=np.ascontiguousarray(halves[..., 0]),
        zero_points=zero_points,
        minimums=np.ascontiguousarray(halves[..., 1]) if kind is Kind.Q4_1 else None,
    )


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise CheckpointError(f"checkpoint {file.path}: metadata {key} is {value!r:.60}, expected one whole number")
    return value
