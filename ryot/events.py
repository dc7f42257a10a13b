"""The one stream of typed events of a run: a JSON line each, appended to `events.jsonl`.

Progress displays, loss curves and TensorBoard files are made from it. Tables are not: they come from what the stages
return. What counts when a run is resumed stands in the journal.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ryot.mapping import Unchecked, formerly, read_mapping, to_mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What all events carry."""

    kind: ClassVar[str]
    time: float = field(default_factory=time.time)
    """Seconds since the epoch, by the clock of the machine that made the event."""


StageName = Literal["data", "cluster", "tune", "train", "export", "measure", "report"]
#: `progress`: how far it is; `cached`: found done already; `lost`: its worker died and it begins again;
#: `rejected`: a checkpoint was damaged.
StageStatus = Literal["begin", "progress", "end", "cached", "failed", "lost", "rejected"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEvent(Event):
    """A stage began or ended, or something happened to it on the way."""

    kind: ClassVar[str] = "stage"
    stage: StageName
    status: StageStatus
    variant: str = ""
    seed: int = 0
    attempt: int | None = None
    """Of a training: which attempt at it."""
    wall_s: float | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEvent(Event):
    """The state of one training after some steps."""

    kind: ClassVar[str] = "step"
    variant: str
    seed: int
    step: int
    num_steps: int
    tokens: int
    """Training tokens seen so far."""
    loss: float
    """Mean training loss since the last event, nats per token."""
    grad_norm: float
    """Largest gradient norm since the last event, before clipping."""
    learning_rate: float
    tokens_per_s: float
    """Since the last event."""
    train_wall_s: float
    """Time in training steps so far, evaluation and checkpoints excluded."""
    rss_bytes: int
    cpu_s: float
    """CPU time of the worker so far."""
    temperature_c: float | None = None
    frequency_mhz: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalEvent(Event):
    """A held-out loss."""

    kind: ClassVar[str] = "eval"
    variant: str
    seed: int
    step: int
    tokens: int
    train_wall_s: float
    split: str
    """`val` or `test`."""
    loss: float
    """Nats per token."""
    bits_per_byte: float
    eval_wall_s: float | None = None
    """Time that taking it took, which is no part of `train_wall_s`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointEvent(Event):
    """The driver accepted a checkpoint."""

    kind: ClassVar[str] = "checkpoint"
    variant: str
    seed: int
    step: int
    path: str
    """Relative to the run folder."""
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GateEvent(Event):
    """A safety or quality gate was passed or breached."""

    kind: ClassVar[str] = "gate"
    variant: str
    seed: int
    gate: str
    """`loss`, `grad_norm`, `parity`, `quality`, …"""
    passed: bool
    value: float | None
    """None when it is not finite."""
    limit: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureEvent(Event):
    """One fresh process measured one case in one round."""

    kind: ClassVar[str] = "measure"
    case: str = field(metadata=formerly("arm"))
    """What was measured, as it is shown."""
    round: int
    ok: bool
    ttft_ms: float | None = None
    decode_tok_s: float | None = None
    peak_rss_bytes: int | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReinforceEvent(Event):
    """One step of reinforcement; means are over its answers, or over their tokens."""

    kind: ClassVar[str] = "reinforce"
    variant: str
    seed: int
    step: int
    """Of the reinforcement, from 1."""
    num_steps: int
    train_wall_s: float
    reward: float
    passed: float
    """Share of answers that passed."""
    differing_groups: float
    """Share of prompts whose answers' rewards differ, which are those that teach something."""
    length: float
    """Tokens of an answer."""
    cut: float
    """Share of answers that did not end by themselves."""
    entropy: float | None
    """Nats per token; None where nothing was learned from the batch."""
    mismatch: float | None
    """Mean absolute difference of a token's log probability between sampler and trainer."""
    mismatch_max: float | None
    kl: float
    """From the model before reinforcement, where that is asked for."""
    clipped: float
    """Share of tokens whose probability ratio was clipped."""
    grad_norm: float
    rollout_s: float
    """Time of sampling and judging."""
    update_s: float
    rollout_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PassEvent(Event):
    """How often answers to held-out prompts pass, with 95 % intervals over prompts."""

    kind: ClassVar[str] = "pass"
    variant: str
    seed: int
    step: int
    reinforce_step: int
    """Steps of reinforcement so far; 0 is before the first."""
    train_wall_s: float
    prompts: int
    samples: int
    """Answers to each, which is k of pass@k."""
    pass_at_1: float
    pass_at_1_low: float
    pass_at_1_high: float
    pass_at_k: float
    pass_at_k_low: float
    pass_at_k_high: float
    eval_wall_s: float


EVENT_TYPES: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (StageEvent, StepEvent, EvalEvent, CheckpointEvent, GateEvent, MeasureEvent, ReinforceEvent, PassEvent)
}


def event_to_dict(event: Event) -> dict[str, object]:
    """The event as plain values, with its `kind`."""
    return {"kind": event.kind, **to_mapping(event, keep_none=True)}


def event_from_dict(values: Unchecked) -> Event:
    """The event that `event_to_dict` made `values` from; fields that this version does not know are dropped."""
    return read_mapping(EVENT_TYPES[values["kind"]], values)


class EventLog:
    """Appends events to a file and hands each one to the listeners, in order."""

    def __init__(self, path: Path):
        _drop_partial_line(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self.listeners: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()

    def emit(self, event: Event) -> None:
        """Write one line and tell the listeners; threads may call it at once."""
        with self._lock:
            self._file.write(json.dumps(event_to_dict(event)) + "\n")
            for listener in self.listeners:
                listener(event)

    def close(self) -> None:
        """Close the file; later events are an error."""
        self._file.close()


def _drop_partial_line(path: Path) -> None:
    """Cut off what a crash or a full disk left of a last line, so that the next one begins on its own."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


class EventReader:
    """Reads a file of events that may still be written to."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._rest = b""

    def read(self) -> Iterator[Event]:
        """The events since the last call; a line that is not whole yet is left, unknown kinds are passed over."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            values = json.loads(line)
            if values.get("kind") in EVENT_TYPES:
                yield event_from_dict(values)

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file in order; none when it is missing."""
    if path.exists():
        with contextlib.closing(EventReader(path)) as reader:
            yield from reader.read()
