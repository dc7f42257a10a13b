"""What CPU this is: model, instruction sets, cores, caches, memory; as the system says, empty where it does not."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

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


def describe_cpu() -> dict[str, Any]:
    """`model`, `isa` (sorted names), `cores` this process may use, `caches` {level: bytes}, `ram_bytes`."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or info.get("Model") or platform.processor() or platform.machine(),
        "isa": sorted(name for flag, name in _ISA.items() if flag in flags),
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def sums_int8_exactly(isa: Collection[str]) -> bool:
    """Whether int8 kernels of a CPU with these instruction sets cannot saturate, so that weights may use all 8 bits."""
    return not _EXACT_INT8.isdisjoint(isa)


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
