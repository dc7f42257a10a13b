"""Live progress on stderr: one line per training where stderr is a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

from ryot.events import (
    CheckpointEvent,
    EvalEvent,
    Event,
    GateEvent,
    MeasureEvent,
    PassEvent,
    ReinforceEvent,
    StageEvent,
    StageStatus,
    StepEvent,
)

#: Without a terminal, a training is heard of at these shares of its budget.
PLAIN_STEPS = 10
REDRAW_S = 0.2


class Progress:
    """Listens to a run's events and shows them; use as a context manager so that the terminal is left clean."""

    def __init__(self, stream: TextIO = sys.stderr):
        self._stream = stream
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._rows: dict[str, str] = {}
        self._val_loss: dict[str, float] = {}
        self._passes: dict[str, float] = {}
        self._tenths: dict[str, int] = {}
        self._drawn = 0
        self._last_draw = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self._draw(force=True)
        self._drawn = 0
        self._rows.clear()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self._step(event)
        elif isinstance(event, EvalEvent):
            self._val_loss[f"{event.variant}/{event.seed}"] = event.loss
        elif isinstance(event, ReinforceEvent):
            self._reinforce(event)
        elif isinstance(event, PassEvent):
            self._passes[f"{event.variant}/{event.seed}"] = event.pass_at_1
        elif isinstance(event, StageEvent):
            self._stage(event)
        elif isinstance(event, GateEvent) and not event.passed:
            self._say(f"gate {event.gate} breached by {event.variant}{f': {event.detail}' if event.detail else ''}")
        elif isinstance(event, MeasureEvent):
            self._measure(event)
        elif isinstance(event, CheckpointEvent):
            pass  # every chunk has one; the journal keeps them

    def tell_data(self, detail: str) -> None:
        """Show how far the preparation of a corpus is, outside a run."""
        self(StageEvent(stage="data", status="progress", detail=detail))

    def _step(self, event: StepEvent) -> None:
        key = f"{event.variant}/{event.seed}"
        share = event.step / event.num_steps
        left = event.train_wall_s / share * (1 - share) if share else 0.0
        held_out = f"  val {self._val_loss[key]:.3f}" if key in self._val_loss else ""
        text = (
            f"{event.variant} seed {event.seed} {share:4.0%}  step {event.step}/{event.num_steps}"
            f"  loss {event.loss:.3f}"
            f"{held_out}  norm {event.grad_norm:.2f}  lr {event.learning_rate:.1e}  {event.tokens_per_s:,.0f} tok/s"
            f"  {left:.0f} s left"
        )
        self._show(key, text, event.step, event.num_steps)

    def _reinforce(self, event: ReinforceEvent) -> None:
        key = f"{event.variant}/{event.seed}"
        held_out = f"  held-out pass@1 {self._passes[key]:.1%}" if key in self._passes else ""
        entropy = "" if event.entropy is None else f"  entropy {event.entropy:.3f}"
        text = (
            f"{event.variant} seed {event.seed} reinforced {event.step / event.num_steps:4.0%}"
            f"  step {event.step}/{event.num_steps}  reward {event.reward:.3f}{entropy}  length {event.length:.1f}"
            f"{held_out}"
        )
        self._show(key, text, event.step, event.num_steps)

    def _show(self, key: str, text: str, step: int, num_steps: int) -> None:
        """A line that is drawn again where stderr is a terminal, and said now and then elsewhere."""
        self._rows[key] = text
        if self._live:
            self._draw()
        elif (tenth := step * PLAIN_STEPS // num_steps) != self._tenths.get(key, 0):
            self._tenths[key] = tenth
            self._say(text)
        if step == num_steps:
            self._rows.pop(key, None)
            if self._live:
                self._say(text)

    def _stage(self, event: StageEvent) -> None:
        who = f" {event.variant} seed {event.seed}" if event.variant else ""
        key = f"{event.stage}{who}"
        if event.status == "progress":
            self._rows[key] = f"{key} in progress: {event.detail}"
            if self._live:
                self._draw()
            else:
                self._say(self._rows.pop(key))
            return
        self._rows.pop(key, None)
        took = f" in {event.wall_s:.1f} s" if event.wall_s is not None else ""
        detail = f": {event.detail}" if event.detail else ""
        words: dict[StageStatus, str] = {
            "begin": "begins",
            "end": f"done{took}",
            "cached": "cached",
            "failed": "failed",
            "lost": "its worker failed",
            "rejected": "does without a checkpoint",
        }
        if event.status != "begin" or event.detail:
            self._say(f"{event.stage}{who} {words[event.status]}{detail}")

    def _measure(self, event: MeasureEvent) -> None:
        if not event.ok:
            self._say(f"measure {event.case} round {event.round} failed: {event.reason}")
        elif self._live:
            figures = f"{event.ttft_ms:.2f} ms  {event.decode_tok_s:,.0f} tok/s"
            self._rows["measure"] = f"measure round {event.round + 1}  {event.case}  {figures}"
            self._draw()

    def _say(self, text: str) -> None:
        self._erase()
        self._stream.write(text + "\n")
        self._draw(force=True)
        self._stream.flush()

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if not self._live or (not force and now - self._last_draw < REDRAW_S):
            return
        self._last_draw = now
        self._erase()
        width = max(20, shutil.get_terminal_size().columns - 1)
        for row in self._rows.values():
            self._stream.write(row[:width] + "\n")
        self._drawn = len(self._rows)
        self._stream.flush()

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}A\x1b[J")
            self._drawn = 0
