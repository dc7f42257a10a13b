"""What one measurement is asked to do and what it answers, as plain data that crosses process borders as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ryot.errors import ConfigError, MeasureError

#: `enforced`: a cgroup held the process to the limit; `checked`: the limit can only be compared with the peak.
MemoryLimit = Literal["enforced", "checked"]

#: Warm-up is over when the medians of the last `STEADY_WINDOW` runs and of those before differ by at most this share.
STEADY_SHARE = 0.05
STEADY_WINDOW = 3
MAX_WARMUP_RUNS = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureSpec:
    """One arm: what to load, what to run, on which cores and within which limits."""

    bundle: str
    """Folder of the bundle."""
    prompt_tokens: int
    """Prompt length for TTFT: the `128` of `pp128`."""
    decode_tokens: int
    """Tokens decoded in one run: the `96` of `tg96 @ d32`."""
    decode_depth: int
    """Tokens already in the cache when decoding begins: the `32` of `tg96 @ d32`."""
    prompts: tuple[tuple[int, ...], ...] = ()
    """Token ids of distinct prompts; the bundle's own held-out prompts when empty."""
    batch_size: int = 1
    """Sequences decoded together."""
    threads: int = 1
    """onnxruntime's threads."""
    cpus: tuple[int, ...] = ()
    """Cores that the process is pinned to; all it may use when empty."""
    memory_limit_bytes: int | None = None
    """Limit on the process's memory."""
    min_runs: int = 16
    """At least so many measured runs."""
    min_time_s: float = 1.0
    """Measured runs go on for at least so long."""
    warmup: int = 3
    """At least so many runs before; see `is_steady` for when they end."""
    end_to_end: bool = True
    """Whether the tokenizer is loaded and TTFT from text is measured too."""
    engine: str = "auto"
    """Which engine runs the graphs; see `ryot.edge.engines`."""
    timeout_s: float = 120.0
    """The process is killed when it has kept its parent waiting for so long in all."""
    turns: bool = False
    """Whether each measured run waits for a line on stdin, so that the processes of a round run by turns."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_depth", "batch_size", "threads", "min_runs"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number above 0")
        for name in ("decode_tokens", "min_time_s", "warmup"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number not below 0")
        _require(self.timeout_s > 0, "timeout_s", self.timeout_s, "a number above 0")
        if self.memory_limit_bytes is not None:
            _require(self.memory_limit_bytes > 0, "memory_limit_bytes", self.memory_limit_bytes, "a number above 0")

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MeasureSpec:
        """The spec that `to_json` wrote; keys that no field has are left out."""
        values = _known(cls, json.loads(text))
        values["prompts"] = tuple(tuple(p) for p in values.get("prompts", ()))
        values["cpus"] = tuple(values.get("cpus", ()))
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureResult:
    """What one fresh process measured; times in the unit of the field's name, raw and in order."""

    arm: str = ""
    round: int = 0
    ok: bool
    reason: str = ""
    """Why there is no measurement; empty when `ok`."""
    engine: str = ""
    """The engine's class: `CapiDecoder` or `Decoder`."""
    precision: str = ""
    import_ms: float | None = None
    """Importing the engine: for `python` numpy and onnxruntime."""
    load_ms: float | None = None
    """From the bundle's folder to a decoder that can take a prompt, the check of its hashes included."""
    first_ttft_ms: float | None = None
    """The first prompt of the process, which the warm figures leave out."""
    cold_start_ms: float | None = None
    """From the start of the process to the first token, tokenization left out."""
    tokenizer_load_ms: float | None = None
    ttft_ms: list[float] = field(default_factory=list)
    """From token ids to the first new token, one a run."""
    e2e_ttft_ms: list[float] = field(default_factory=list)
    """From text to the text of the first new token, one a run."""
    decode_tok_s: list[float] = field(default_factory=list)
    """Tokens of all rows per second, one a run."""
    token_ms: list[list[float]] = field(default_factory=list)
    """Time of each step, a list a run."""
    peak_rss_bytes: int | None = None
    """VmHWM, read by the process at its own end."""
    peak_rss_outside_bytes: int | None = None
    """VmHWM, read by the parent before the process may end."""
    memory_limit: MemoryLimit | None = None
    memory_limit_bytes: int | None = None
    warmup_runs: int = 0
    steady: bool = False
    """Whether the warm-up ended because the times had settled."""
    runs: int = 0
    runs_ok: int = 0
    calibration_ms: list[float] = field(default_factory=list)
    """A fixed loop in Python, before and after: it should take the same time in every process."""
    load_average: list[float] = field(default_factory=list)
    """Over one minute, before and after."""
    threads: int = 1
    cpus: list[int] = field(default_factory=list)
    """Cores that the process could use."""
    batch_size: int = 1
    prompt_tokens: int = 0
    decode_tokens: int = 0
    decode_depth: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    manifest_sha256: str = ""
    started_at: str = ""
    """UTC, ISO 8601."""

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as a report keeps them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> MeasureResult:
        """The result that `to_mapping` gave; keys that no field has are left out."""
        return cls(**_known(cls, values))


def is_steady(runs_ms: Sequence[tuple[float, float]]) -> bool:
    """Whether the (TTFT, decode) times have settled.

    Both medians of the last three runs must lie within 5 % of those of the three runs before.
    """
    if len(runs_ms) < 2 * STEADY_WINDOW:
        return False
    for times in zip(*runs_ms[-2 * STEADY_WINDOW :], strict=True):
        before, after = sorted(times[:STEADY_WINDOW]), sorted(times[STEADY_WINDOW:])
        middle = STEADY_WINDOW // 2
        if abs(after[middle] - before[middle]) > STEADY_SHARE * before[middle]:
            return False
    return True


def parse_spec(text: str) -> MeasureSpec:
    """The spec that a measuring process got on stdin. Raises `MeasureError` when it is none."""
    try:
        return MeasureSpec.from_json(text)
    except (ValueError, TypeError, ConfigError) as error:
        raise MeasureError(f"the measurement's spec on stdin cannot be used: {error}") from error


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: got {value!r}, expected {rule}")
