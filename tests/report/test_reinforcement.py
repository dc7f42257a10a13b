"""Curves of a reinforcement: from events to the report's figures."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files
from typing import Any

import jsonschema
import pytest

from ryot.events import Event, PassEvent, ReinforceEvent
from ryot.report.build import build_report
from ryot.report.html import render_html
from ryot.report.plots import draw_plots
from ryot.report.reinforcement import describe_passes, reinforcement_from_events
from ryot.report.rows import VariantRow, report_to_dict


def step_event(step: int, reward: float, entropy: float | None = 0.5) -> ReinforceEvent:
    values: dict[str, Any] = dict.fromkeys(
        (field.name for field in dataclasses.fields(ReinforceEvent) if field.name != "time"), 0.1
    )
    return ReinforceEvent(
        **(values | {"variant": "a", "seed": 0, "step": step, "num_steps": 4, "reward": reward, "entropy": entropy})
    )


def pass_event(step: int, value: float) -> PassEvent:
    values: dict[str, Any] = dict.fromkeys(
        (field.name for field in dataclasses.fields(PassEvent) if field.name != "time"), 0.1
    )
    known = {"pass_at_1": value, "pass_at_1_low": value - 0.05, "pass_at_1_high": value + 0.05}
    return PassEvent(**(values | {"variant": "a", "seed": 0, "step": step, "reinforce_step": step} | known))


EVENTS: list[Event] = [
    pass_event(0, 0.3), step_event(1, 0.2), step_event(2, 0.9), step_event(2, 0.3), step_event(3, 0.4, None),
    pass_event(4, 0.6),
]  # fmt: skip


def test_the_last_word_on_a_step_counts_and_what_is_not_known_is_left_out() -> None:
    found = reinforcement_from_events(EVENTS)["a", 0]
    assert found["reward"] == ((1, 0.2), (2, 0.3), (3, 0.4))
    assert [point[0] for point in found["entropy"]] == [1, 2]
    assert found["pass_at_1"] == ((0, 0.3, 0.25, pytest.approx(0.35)), (4, 0.6, pytest.approx(0.55), 0.65))


def test_the_report_draws_and_says_what_reinforcement_did() -> None:
    row = VariantRow(name="a", seed=0, params=10, tokens=10, reinforcement=reinforcement_from_events(EVENTS)["a", 0])
    report = build_report(
        run_id="r", command="c", artifacts=[], results={}, targets=[], machine={}, corpus={}, variants=[row]
    )
    [line, _] = describe_passes(report)
    assert line == (
        "a (seed 0): held-out pass@1 30.0% [25.0%, 35.0%] before reinforcement, 60.0% [55.0%, 65.0%] after."
    )
    assert line in report.notes
    names = [plot.name for plot in draw_plots(report)]
    assert names == ["passes", "reinforce-reward", "reinforce-entropy", "reinforce-length", "reinforce-mismatch"]
    assert "Held-out prompts that are answered right" in render_html(report)
    schema = json.loads(files("ryot.report").joinpath("report.schema.json").read_text())
    values = json.loads(json.dumps(report_to_dict(report)))["variants"][0]
    jsonschema.validate(values, {"$defs": schema["$defs"], "$ref": "#/$defs/variant"})
