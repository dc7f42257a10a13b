"""Targets: contracts on latency, throughput, memory, size, quality and context, read from TOML.

summary = "one line for people"
prefer = "smallest"            # or "fastest": what to choose among the artifacts that pass
[limits]                       # every key carries its unit; MB is 10^6 bytes
ttft_ms = 120
[device]                       # left out when the target is this machine, whatever it is
name = "Raspberry Pi 5"
[sources]                      # where each number comes from, by its key
ttft_ms = "…"
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ryot.config import build_from_mapping, check_known, find_named, list_named, load_toml, unknown
from ryot.errors import ConfigError
from ryot.mapping import Unchecked


@dataclass(frozen=True, slots=True)
class LimitKind:
    """What one limit is about: its verdict's name, how people call it, its unit and its direction."""

    metric: str
    title: str
    unit: str
    at_most: bool
    lowest: float
    highest: float
    """Values outside `lowest`..`highest` can't be meant."""

    @property
    def sign(self) -> str:
        return "≤" if self.at_most else "≥"


LIMITS: dict[str, LimitKind] = {
    "ttft_ms": LimitKind("ttft", "TTFT", "ms", True, 1e-3, 3.6e6),
    "decode_tok_s": LimitKind("throughput", "decode", "tok/s", False, 1e-3, 1e6),
    "peak_rss_mb": LimitKind("memory", "peak memory", "MB", True, 1.0, 1e7),
    "size_mb": LimitKind("size", "size", "MB", True, 1e-3, 1e7),
    "bpb_ratio": LimitKind("quality", "bpb ratio", "ratio", True, 1.0, 100.0),
    "context_tokens": LimitKind("context", "context", "tokens", False, 1, 1e8),
}
#: The same, by the verdict's name.
METRICS: dict[str, str] = {kind.metric: key for key, kind in LIMITS.items()}

_BARE = {
    "ttft": "ttft_ms", "latency": "ttft_ms", "decode": "decode_tok_s", "decode_tok": "decode_tok_s",
    "throughput": "decode_tok_s", "tok_s": "decode_tok_s", "peak_rss": "peak_rss_mb", "rss": "peak_rss_mb",
    "memory": "peak_rss_mb", "size": "size_mb", "bpb": "bpb_ratio", "quality": "bpb_ratio", "context": "context_tokens",
    "ram": "ram_mb",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """The machine that a target stands for."""

    name: str
    """What people call it."""
    cores: int
    """CPU cores that the program may use."""
    ram_mb: float
    """Memory in MB (10^6 bytes)."""
    isa: tuple[str, ...]
    """Vector instruction sets, by the names that `ryot-deploy doctor` prints."""
    threads: int = 1
    """Threads that the model runs on; at most `cores`."""
    match: str = ""
    """Part of the CPU's or the board's name by which a machine is recognised as this device; empty for never."""

    def __post_init__(self) -> None:
        if self.cores < 1:
            raise ConfigError(f"cores: got {self.cores}, expected at least 1")
        if not 1 <= self.threads <= self.cores:
            raise ConfigError(f"threads: got {self.threads}, expected 1 to {self.cores}, the device's cores")
        if not (math.isfinite(self.ram_mb) and self.ram_mb > 0):
            raise ConfigError(f"ram_mb: got {self.ram_mb}, expected a number above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A contract that an exported artifact passes or misses."""

    name: str
    summary: str = ""
    prefer: Literal["smallest", "fastest"] = "smallest"
    """What is chosen among the artifacts that pass every limit."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """By the keys of LIMITS."""
    device: Device | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each number comes from."""

    @property
    def threads(self) -> int:
        """Threads to measure with."""
        return self.device.threads if self.device else 1

    @property
    def memory_limit_bytes(self) -> int | None:
        """The memory limit to enforce while measuring, where the system allows it; None without one."""
        return round(self.limits["peak_rss_mb"] * 1e6) if "peak_rss_mb" in self.limits else None

    def is_device(self, machine: Mapping[str, object]) -> bool:
        """Whether `machine` (a recorded environment) is the device; a target without a device is any machine."""
        if self.device is None:
            return True
        return bool(self.device.match) and self.device.match.lower() in " ".join(_strings(machine)).lower()


def cpu_name(machine: Mapping[str, object]) -> str:
    """The CPU's model as a recorded environment names it; `this CPU` where it does not."""
    cpu = machine.get("cpu")
    nested = cpu.get("model") if isinstance(cpu, Mapping) else cpu
    return str(machine.get("cpu_model") or nested or machine.get("model") or "this CPU")


def _strings(value: object) -> list[str]:
    if isinstance(value, Mapping):
        return [text for v in value.values() for text in _strings(v)]
    return [value] if isinstance(value, str) else []


def list_targets() -> list[Target]:
    """Every target that the package carries, by name."""
    return [load_target(name) for name in list_named("targets")]


def load_targets(names: Iterable[str]) -> list[Target]:
    """The targets of several names or files; one named twice counts once, two of one name are refused."""
    found: dict[str, tuple[Path, Target]] = {}
    for name in names:
        path = find_named("targets", name).resolve()
        if path.stem in found and found[path.stem][0] != path:
            raise ConfigError(f"target: {found[path.stem][0]} and {path} share the name {path.stem!r}; rename one file")
        found[path.stem] = (path, load_target(name))
    return [target for _, target in found.values()]


def load_target(name: str) -> Target:
    """A target by a name that the package knows or by a path to a `.toml` file; `ConfigError` names what is wrong."""
    path = find_named("targets", name)
    return build_target(path.stem, load_toml(path), str(path) if name.endswith(".toml") else f"target {name}")


def build_target(name: str, values: Unchecked, where: str) -> Target:
    """A target from its TOML tables (or from a report); `where` begins every error message."""
    check_known(values, ("name", "summary", "prefer", "limits", "device", "sources"), where)
    for table in ("limits", "device", "sources"):
        if not isinstance(values.get(table, {}), Mapping):
            raise ConfigError(f"{where}: {table}: got {values[table]!r}, expected a table [{table}]")
    limits = _check_limits(values.get("limits", {}), f"{where}: limits")
    device = None
    if "device" in values:
        _check_units(values["device"], ("name", "cores", "ram_mb", "isa", "threads", "match"), f"{where}: device")
        device = build_from_mapping(Device, values["device"], f"{where}: device")
        if limits.get("peak_rss_mb", 0) > device.ram_mb:
            raise ConfigError(
                f"{where}: limits: peak_rss_mb: got {limits['peak_rss_mb']:g},"
                f" expected at most the device's ram_mb {device.ram_mb:g}"
            )
    sources = values.get("sources", {})
    check_known(sources, (*LIMITS, "cores", "ram_mb", "isa", "threads"), f"{where}: sources")
    prefer = values.get("prefer", "smallest")
    if prefer not in ("smallest", "fastest"):
        raise ConfigError(unknown(f"{where}: prefer", prefer, ("smallest", "fastest")))
    return Target(
        name=name,
        summary=str(values.get("summary", "")),
        prefer=prefer,
        limits=limits,
        device=device,
        sources=dict(sources),
    )


def _check_limits(limits: Mapping[str, object], where: str) -> dict[str, float]:
    if not limits:
        raise ConfigError(f"{where}: none given, expected at least one of {', '.join(LIMITS)}")
    _check_units(limits, tuple(LIMITS), where)
    checked = {}
    for key, value in limits.items():
        kind = LIMITS[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{where}: {key}: got {value!r}, expected a number in {kind.unit}")
        if not kind.lowest <= value <= kind.highest:
            raise ConfigError(
                f"{where}: {key}: got {value!r}, an impossible limit;"
                f" expected {kind.lowest:g} to {kind.highest:g} {kind.unit}"
            )
        checked[key] = float(value)
    return checked


def _check_units(values: Mapping[str, object], known: tuple[str, ...], where: str) -> None:
    """Like `check_known`, but a key that only lacks its unit, or has another one, is told so."""
    for key in values:
        if key in known:
            continue
        meant = _BARE.get(key)
        if meant in known:
            raise ConfigError(f"{where}: key {key!r} has no unit; did you mean {meant!r}?")
        stem = key.rsplit("_", 1)[0]
        meant = _BARE.get(stem) or next((k for k in known if k.rsplit("_", 1)[0] == stem and "_" in k), None)
        if meant in known and not difflib.get_close_matches(key, known, n=1, cutoff=0.93):
            raise ConfigError(f"{where}: key {key!r} has a unit that is not known here; did you mean {meant!r}?")
    check_known(values, known, where)
