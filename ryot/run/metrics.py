"""What a run knows of a training; apart from what trains, so that run folders are read without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from ryot.events import EvalEvent, Event


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainMetrics:
    """What is known of a training at some point; losses in nats per token, `bpb` in bits per byte."""

    tokens: int = 0
    train_wall_s: float | None = None
    """Time in training steps, evaluation, checkpoints and compilation excluded."""
    compile_s: float | None = None
    grad_norm_max: float | None = None
    initial_val_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    test_loss: float | None = None
    test_bpb: float | None = None

    def after(self, counters: TrainMetrics, events: Iterable[Event]) -> TrainMetrics:
        """What is known after a worker's report: its counters, and the held-out losses among its events."""
        known = dataclasses.replace(
            self,
            tokens=counters.tokens,
            train_wall_s=counters.train_wall_s,
            compile_s=counters.compile_s,
            grad_norm_max=counters.grad_norm_max,
        )
        for event in events:
            if not isinstance(event, EvalEvent):
                continue
            if event.split == "test":
                known = dataclasses.replace(known, test_loss=event.loss, test_bpb=event.bits_per_byte)
                continue
            if event.step == 0:
                known = dataclasses.replace(known, initial_val_loss=event.loss)
            known = dataclasses.replace(known, val_loss=event.loss, val_bpb=event.bits_per_byte)
        return known
