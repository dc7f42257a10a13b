"""Curves of a reinforcement from a run's events, and their figures for report.html."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ryot.events import Event, PassEvent, ReinforceEvent
from ryot.report.rows import ReinforceCurves, Report

#: Of a step's event, what becomes a curve, with its heading, the axis, and how to read it.
SERIES: Mapping[str, tuple[str, str, str]] = {
    "reward": ("Reward", "mean reward of sampled answers", "Of the answers that were learned from, not held out."),
    "entropy": (
        "Entropy",
        "nats per token",
        "Of what the answers' tokens were drawn from; 0 is a model that never varies.",
    ),
    "length": ("Length", "tokens of an answer", "Of sampled answers, their end included."),
    "mismatch": (
        "Engine against trainer",
        "mean difference of log probability",
        "How far the probabilities of the engine that sampled and of the model that learns lie apart.",
    ),
}


class Passes(NamedTuple):
    """A pass@k at one step, with its interval."""

    step: int
    value: float
    low: float
    high: float


def reinforcement_from_events(events: Iterable[Event]) -> dict[tuple[str, int], ReinforceCurves]:
    """For each (variant, seed) that was reinforced, its curves; the last word on a step counts, as after a resume."""
    series: dict[tuple[str, int], dict[str, dict[int, tuple[float, ...]]]] = {}
    for event in events:
        if isinstance(event, ReinforceEvent):
            found = series.setdefault((event.variant, event.seed), {})
            for name in SERIES:
                value = getattr(event, name)
                if value is not None:
                    found.setdefault(name, {})[event.step] = (event.step, value)
        elif isinstance(event, PassEvent):
            found = series.setdefault((event.variant, event.seed), {})
            for name in ("pass_at_1", "pass_at_k"):
                point = (getattr(event, f"{name}{end}") for end in ("", "_low", "_high"))
                found.setdefault(name, {})[event.reinforce_step] = (event.reinforce_step, *point)
    return {
        key: {name: tuple(points[step] for step in sorted(points)) for name, points in found.items()}
        for key, found in series.items()
    }


def passes_of(curves: ReinforceCurves, name: str = "pass_at_1") -> list[Passes]:
    """The points of a pass@k."""
    return [Passes(int(point[0]), *point[1:]) for point in curves.get(name, ())]


def describe_passes(report: Report) -> list[str]:
    """A line a reinforced training: how often held-out answers passed before and after."""
    lines = []
    for row in report.variants:
        for name, label in (("pass_at_1", "pass@1"), ("pass_at_k", "pass@k")):
            points = passes_of(row.reinforcement, name)
            if len(points) > 1:
                before, after = (f"{p.value:.1%} [{p.low:.1%}, {p.high:.1%}]" for p in (points[0], points[-1]))
                lines.append(
                    f"{row.name} (seed {row.seed}): held-out {label} {before} before reinforcement, {after} after."
                )
    return lines


def series_numbers(report: Report, name: str) -> Sequence[tuple[str, int, float, float]]:
    """All points of one curve: variant, seed, step, value."""
    return [
        (row.name, row.seed, point[0], point[1]) for row in report.variants for point in row.reinforcement.get(name, ())
    ]
