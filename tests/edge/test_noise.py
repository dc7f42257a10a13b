from __future__ import annotations

from typing import Any

import pytest

from ryot.edge.noise import find_noise
from ryot.edge.protocol import MeasureResult


def result(**changes: Any) -> MeasureResult:
    values: dict[str, Any] = {
        "case": "a",
        "ok": True,
        "steady": True,
        "threads": 1,
        "ttft_ms": [5.0],
        "calibration_ms": [20.0, 20.5],
        "load_average": [0.6, 0.9],
    }
    return MeasureResult(**values | changes)


def test_a_quiet_machine_gives_no_note() -> None:
    assert find_noise([result(), result(), result()]) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"calibration_ms": [20.0, 26.0]}, "calibration loop took 20.0 to 26.0 ms"),
        ({"ttft_ms": [7.0]}, "in 1 of 1 cases the rounds' median TTFT differ by more than 15% (a: 5.00 to 7.00 ms)"),
        ({"steady": False}, "1 of 3 processes did not become steady"),
    ],
)
def test_a_noisy_machine_is_noticed(changes: dict[str, Any], word: str) -> None:
    (note,) = find_noise([result(), result(), result(**changes)])
    assert word in note


def test_a_busy_machine_is_noticed_and_what_ran_before_is_not() -> None:
    (note,) = find_noise([result(load_average=[3.1, 3.0])] * 3)
    assert note == "the load average was 3.1, the measurement itself makes 1"
    assert find_noise([result(load_average=[3.1, 2.0]), result(), result()]) == []
