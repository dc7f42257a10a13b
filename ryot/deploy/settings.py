"""How weights and caches are quantized: one type from tuning, through a run's plan, to the exported artifact."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import get_args

from ryot.config import GraphAttention
from ryot.edge.bundle import KVDtype
from ryot.edge.machine import describe_cpu, sums_int8_exactly
from ryot.errors import ConfigError
from ryot.models.block_sizes import BLOCK_SIZES


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSettings:
    """How an artifact is made from weights."""

    int8_block_size: int = 128
    """Input features that share a scale at 8 bits; a matrix whose width it does not divide takes a smaller one."""
    int4_block_size: int = 128
    """The same at 4 bits where quality allows; matrices that need it take smaller ones."""
    dynamic_bits: int = 7
    """Bits of dynamic-int8 weights: 7 where a CPU saturates (x86 without VNNI), 8 elsewhere."""
    kv_dtype: KVDtype = "float32"
    """Type of the key-value cache."""
    prefill_attention: GraphAttention = "flash"
    """How a pair's prefill graph attends; a graph that decodes too has `flash`, which is faster at depth."""
    fastest: str = ""
    """The precision with the shortest request, possibly a pair; empty when nothing was measured."""

    def __post_init__(self) -> None:
        for name in ("int8_block_size", "int4_block_size"):
            if getattr(self, name) not in BLOCK_SIZES:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected one of {BLOCK_SIZES}")
        if self.dynamic_bits not in (7, 8):
            raise ConfigError(f"dynamic_bits: got {self.dynamic_bits!r}, expected 7 or 8")
        for name, known in (("kv_dtype", KVDtype), ("prefill_attention", GraphAttention)):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected {' or '.join(get_args(known))}")

    def block_size(self, bits: int) -> int:
        """The block size at 4 or 8 bits."""
        return self.int4_block_size if bits == 4 else self.int8_block_size


def dynamic_bits(device_isas: Iterable[Collection[str] | None]) -> int:
    """Bits of dynamic-int8 weights that every one of these devices sums exactly; None stands for this machine."""
    isas = [describe_cpu()["isa"] if isa is None else isa for isa in device_isas]
    return 8 if all(sums_int8_exactly(isa) for isa in isas) else 7
