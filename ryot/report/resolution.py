"""What a measurement can tell apart, from a long recording of the same case against itself.

The recording is interleaved like any other; it is cut into disjoint windows of as many rounds as a measurement has,
and each window is judged as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ryot.report.stats import Rounds, call_difference, ratio_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """How often A differs from A, and how slow B must be to be found."""

    windows: int
    rounds: int
    """In one window."""
    false_alarms: int
    """Windows that call A different from A; at most 5 in 100 are allowed."""
    smallest_slowdown: float
    """The share by which B must be slower to be called so in 80 % of the windows."""


def measure_resolution(a: Rounds, b: Rounds, *, rounds: int, power: float = 0.8) -> Resolution:
    """Judge the disjoint windows of `rounds` rounds in two recordings of the same case (times: larger is slower).

    A slowdown moves a window's interval on the log scale without changing its width, so the slowdown that a window
    would just find is 1 / low - 1, and the one that a share `power` of them finds is that quantile.
    """
    starts = range(0, min(len(a), len(b)) - rounds + 1, rounds)
    found = [ratio_interval(b[k : k + rounds], a[k : k + rounds]) for k in starts]
    intervals = [i for i in found if i is not None]
    assert intervals, "no window has samples on both sides"
    return Resolution(
        windows=len(intervals),
        rounds=rounds,
        false_alarms=sum(call_difference(i) != "no difference" for i in intervals),
        smallest_slowdown=float(np.quantile([1 / i.low - 1 for i in intervals], power, method="higher")),
    )
