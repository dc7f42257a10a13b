"""The progress display: every event has its words, on a terminal, in a pipe and in a log file."""

from __future__ import annotations

import io
import os
import pty
from typing import get_args

import pytest

from ryot.cli.progress import Progress
from ryot.events import CheckpointEvent, EvalEvent, GateEvent, MeasureEvent, StageEvent, StageStatus, StepEvent


def step(number: int, variant: str = "optimized") -> StepEvent:
    return StepEvent(
        variant=variant,
        seed=0,
        step=number,
        num_steps=100,
        tokens=number * 128,
        loss=4.25,
        grad_norm=1.5,
        learning_rate=1e-3,
        tokens_per_s=9000.0,
        train_wall_s=number / 10,
        rss_bytes=1,
        cpu_s=1.0,
    )


def told(*events: object) -> list[str]:
    stream = io.StringIO()
    with Progress(stream) as show:
        for event in events:
            show(event)  # type: ignore[arg-type]
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("status", get_args(StageStatus))
def test_every_state_of_a_stage_has_its_words(status: StageStatus) -> None:
    [line] = told(StageEvent(stage="train", status=status, variant="optimized", detail="why", wall_s=2.0))
    assert line.startswith("train optimized seed 0 ") and line.endswith(": why")


def test_without_a_terminal_a_training_is_heard_of_at_every_tenth_of_it() -> None:
    lines = told(*[step(n) for n in range(1, 101)])
    assert len(lines) == 10 and "10%" in lines[0] and "step 100/100" in lines[-1]
    assert not any("\x1b" in line for line in lines)


def test_what_goes_wrong_is_said_and_what_is_routine_is_not() -> None:
    held_out = EvalEvent(
        variant="optimized", seed=0, step=0, tokens=0, train_wall_s=0.0, split="val", loss=7.6, bits_per_byte=3.0
    )
    assert told(held_out, CheckpointEvent(variant="a", seed=0, step=1, path="p", sha256="s")) == []
    assert "val 7.600" in told(held_out, step(10))[0]
    breach = GateEvent(variant="a", seed=0, gate="loss", passed=False, value=None, limit=10.0, detail="loss is nan")
    assert told(breach) == ["gate loss breached by a: loss is nan"]
    assert told(MeasureEvent(case="a/fp32", round=0, ok=False, reason="died")) == [
        "measure a/fp32 round 0 failed: died"
    ]


def test_rows_are_cut_to_a_narrow_terminal_and_taken_away_at_the_end() -> None:
    reader, writer = pty.openpty()
    os.environ["COLUMNS"], before = "40", os.environ.get("COLUMNS")
    try:
        with os.fdopen(writer, "w") as terminal, Progress(terminal) as show:
            show(step(10))
            show(step(20, "baseline"))
            terminal.flush()
            drawn = os.read(reader, 10_000).decode()
    finally:
        os.close(reader)
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    rows = [line for line in drawn.replace("\r", "").split("\n") if "step" in line or "seed" in line]
    assert rows and all(len(row.split("\x1b[J")[-1]) <= 39 for row in rows)
