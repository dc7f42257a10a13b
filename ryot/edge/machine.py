"""What CPU this is: model, instruction sets, cores, caches, memory; as the system says, empty where it does not."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from ryot.edge.bundle import Bundle

#: Instruction sets that decide which kernels exist, by the kernel's own flag names (x86 `flags`, Arm `Features`).
_ISA = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512-vnni",
    "avx_vnni": "avx-vnni",
    "avx512_bf16": "avx512-bf16",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}

#: With one of these, 8-bit products are summed in 32 bits and cannot saturate.
_EXACT_INT8 = {"avx512-vnni", "avx-vnni", "dotprod", "i8mm", "amx-int8"}


class CpuFacts(TypedDict):
    """What a machine's record says about its CPU."""

    model: str
    isa: list[str]
    """Sorted names."""
    cores: int
    """That this process may use."""
    caches: dict[str, int]
    """Bytes by level."""
    ram_bytes: int


def describe_cpu() -> CpuFacts:
    """What CPU this is."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or info.get("Model") or platform.processor() or platform.machine(),
        "isa": isa_names(flags),
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def isa_names(flags: Collection[str]) -> list[str]:
    """Sorted names of the instruction sets that decide about kernels, from the kernel's flags."""
    return sorted(name for flag, name in _ISA.items() if flag in flags)


def sums_int8_exactly(isa: Collection[str]) -> bool:
    """Whether int8 kernels of a CPU with these instruction sets cannot saturate, so that weights may use all 8 bits."""
    return not _EXACT_INT8.isdisjoint(isa)


def overflows_int8(isa: Collection[str]) -> bool:
    """Whether int8 kernels of such a CPU add pairs of products in 16 bits, where those of 8-bit weights overflow.

    x86 with AVX2 and nothing newer for it does; SSE4.2 alone and Arm without dot products do not (seen in qemu).
    """
    return "avx2" in isa and not sums_int8_exactly(isa)


def overflows_on(bundle: Bundle, isa: Collection[str]) -> bool:
    """Whether sums of a bundle's int8 products overflow on such a CPU: those of dynamic int8 with 8-bit weights.

    Golden tokens may come out all the same: few activations are so large, and which they are no export can tell without
    such a kernel.
    """
    settings = bundle.manifest.get("quantization") or {}
    return settings.get("dynamic_bits") == 8 and "int8-dyn" in bundle.precision and overflows_int8(isa)


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}


def _caches() -> dict[str, int]:
    caches: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level = (index / "type").read_text().strip(), (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction":
            caches[f"L{level}"] = int(size.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
    return caches
