"""Loss curves from a run's events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ryot.events import EvalEvent, Event, StepEvent
from ryot.report.rows import Curve

#: Points kept of a training curve.
CURVE_POINTS = 200


def curves_from_events(events: Iterable[Event]) -> dict[tuple[str, int], tuple[Curve, Curve]]:
    """For each (variant, seed) the held-out and the training loss curve that the events hold.

    A training that was resumed writes some steps twice: the last word on a number of tokens counts.
    """
    held: dict[tuple[str, int], dict[int, tuple[float, float, float]]] = {}
    seen: dict[tuple[str, int], dict[int, tuple[float, float, float]]] = {}
    for event in events:
        if isinstance(event, EvalEvent) and event.split == "val":
            held.setdefault((event.variant, event.seed), {})[event.tokens] = (
                float(event.tokens), event.train_wall_s, event.loss
            )  # fmt: skip
        elif isinstance(event, StepEvent):
            seen.setdefault((event.variant, event.seed), {})[event.tokens] = (
                float(event.tokens), event.train_wall_s, event.loss
            )  # fmt: skip
    return {key: (_thin(held.get(key, {})), _thin(seen.get(key, {}))) for key in {**held, **seen}}


def _thin(points: Mapping[int, tuple[float, float, float]]) -> Curve:
    ordered = [points[tokens] for tokens in sorted(points)]
    if len(ordered) <= CURVE_POINTS:
        return tuple(ordered)
    index = np.linspace(0, len(ordered) - 1, CURVE_POINTS).round().astype(int)
    return tuple(ordered[i] for i in index)
