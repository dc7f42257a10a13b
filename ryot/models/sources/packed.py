"""Hugging Face checkpoints that hold 4- or 8-bit codes already: GPTQ's and AWQ's packing, read back into matrices.

Both pack codes into int32 and keep a scale and a zero point per group of inputs and output:
GPTQ (AutoGPTQ's format, also GPTQModel's): qweight [in / n, out], the n codes of a word follow each other along the
inputs; qzeros [groups, out / n], one less than the zero point in the first format; g_idx [in] names each input's group.
AWQ (AutoAWQ's "gemm"): qweight [in, out / 8], qzeros [groups, out / 8], a word's codes lie in the order below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ryot.errors import CheckpointError
from ryot.models.sources.checkpoint import FloatArray, Json, QuantBlocks, Tensors
from ryot.models.sources.safetensors_file import StoredTensor, load_float32

#: The output that each of AWQ's eight 4-bit places, lowest first, belongs to.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packing:
    """`zero_offset` is what to add to a stored zero point."""

    method: str
    bits: int
    zero_offset: int


class PackedTensors:
    """Tensors of which some matrices are packed; those are seen as `NAME.weight` like any other."""

    def __init__(self, stored: dict[str, StoredTensor], packing: _Packing):
        self._stored = stored
        self._packing = packing
        self._packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}

    def names(self) -> list[str]:
        names = []
        for name in self._stored:
            base, _, part = name.rpartition(".")
            if base not in self._packed or part not in _PARTS:
                names.append(name)
            elif part == "qweight":
                names.append(f"{base}.weight")
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        if (base := self._base(name)) is None:
            return self._stored[name].shape
        rows, cols = self._stored[f"{base}.qweight"].shape
        per_word = 32 // self._packing.bits
        return (cols, rows * per_word) if self._packing.method == "gptq" else (cols * per_word, rows)

    def dtype(self, name: str) -> str:
        return self._stored[name].dtype if self._base(name) is None else self._packing.method.upper()

    def load(self, name: str) -> FloatArray:
        if (base := self._base(name)) is None:
            return load_float32(self._stored[name], name)
        codes, zeros = self._codes(base)
        scales, groups = self._scales(base), self._groups(base, len(codes))
        values = codes.astype(np.float32)
        values -= zeros[groups]
        values *= scales[groups]
        return np.ascontiguousarray(values.T)

    def blocks(self, name: str) -> QuantBlocks | None:
        if (base := self._base(name)) is None:
            return None
        codes, zeros = self._codes(base)
        block_size, rest = divmod(len(codes), len(zeros))
        in_order = np.array_equal(self._groups(base, len(codes)), np.arange(len(codes)) // max(block_size, 1))
        if rest or not in_order or zeros.max() > 255:
            return None
        return QuantBlocks(
            bits=self._packing.bits,
            block_size=block_size,
            codes=np.ascontiguousarray(codes.T),
            scales=np.ascontiguousarray(self._scales(base).T),
            zero_points=np.ascontiguousarray(zeros.T.astype(np.uint8)),
            minimums=None,
        )

    def _base(self, name: str) -> str | None:
        base = name.removesuffix(".weight")
        return base if base != name and base in self._packed else None

    def _codes(self, base: str) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        """Codes [in, out] and zero points [groups, out]."""
        words = self._stored[f"{base}.qweight"].read("<u4")
        codes = _unpack(words.T, self._packing).T if self._packing.method == "gptq" else _unpack(words, self._packing)
        zeros = _unpack(self._stored[f"{base}.qzeros"].read("<u4"), self._packing).astype(np.int16)
        return codes, zeros + np.int16(self._packing.zero_offset)

    def _scales(self, base: str) -> FloatArray:
        return load_float32(self._stored[f"{base}.scales"], f"{base}.scales")

    def _groups(self, base: str, num_inputs: int) -> NDArray[np.int64]:
        if (index := self._stored.get(f"{base}.g_idx")) is not None:
            return index.read("<i4").astype(np.int64)
        return np.arange(num_inputs) // (num_inputs // self._stored[f"{base}.scales"].shape[0])


def open_packed(stored: dict[str, StoredTensor], quantization: Json, where: str) -> Tensors:
    """The tensors of a checkpoint whose config has a `quantization_config`; other kinds than the two are refused."""
    values = quantization if isinstance(quantization, dict) else {}
    method = values.get("quant_method")
    bits = values.get("bits", values.get("w_bit"))
    if method == "gptq" and bits in (4, 8):
        offset = 0 if values.get("checkpoint_format") == "gptq_v2" else 1
    elif method == "awq" and bits == 4 and values.get("version", "gemm") == "gemm" and "zero_point" in values:
        offset = 0
    else:
        raise CheckpointError(
            f"checkpoint {where}: quantization_config says {method} with {bits} bits, expected none, gptq with 4 or 8, "
            "or awq (gemm) with 4",
            hint="use the model's unquantized weights",
        )
    tensors = PackedTensors(stored, _Packing(method=str(method), bits=int(bits), zero_offset=offset))
    for name in stored:
        base, _, part = name.rpartition(".")
        if part == "qweight" and not {f"{base}.qzeros", f"{base}.scales"} <= stored.keys():
            raise CheckpointError(f"checkpoint {where}: {base} has qweight without qzeros or scales")
    return tensors


def _unpack(words: NDArray[np.generic], packing: _Packing) -> NDArray[np.uint8]:
    """The codes of packed words, along the last axis."""
    per_word = 32 // packing.bits
    order = _AWQ_ORDER if packing.method == "awq" else range(per_word)
    codes = np.empty((*words.shape, per_word), np.uint8)
    mask = np.uint32((1 << packing.bits) - 1)
    for place, output in enumerate(order):
        codes[..., output] = (words.astype(np.uint32, copy=False) >> np.uint32(packing.bits * place)) & mask
    return codes.reshape(*words.shape[:-1], -1)
