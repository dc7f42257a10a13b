"""What a recording of A against A says about the measurement is checked by putting a true slowdown in."""

from __future__ import annotations

import numpy as np

from ryot.report.resolution import measure_resolution
from ryot.report.stats import call_difference, ratio_interval

from .test_stats import process

QUIET = {"between": 0.006, "inside": 0.01, "bursts": 0.0}


def test_a_slowdown_of_the_stated_size_is_found_in_four_of_five_windows():
    rng = np.random.default_rng(11)
    a, b = ([process(rng, **QUIET) for _ in range(300)] for _ in range(2))
    found = measure_resolution(a, b, rounds=3)
    assert (found.windows, found.rounds) == (100, 3)
    assert found.false_alarms <= 5
    slower = [[v * (1 + found.smallest_slowdown * 1.0001) for v in r] for r in b]
    calls = [call_difference(ratio_interval(slower[k : k + 3], a[k : k + 3])) for k in range(0, 300, 3)]
    assert 0.80 <= calls.count("higher") / 100 <= 0.82


def test_more_rounds_find_smaller_slowdowns():
    rng = np.random.default_rng(12)
    a, b = ([process(rng, **QUIET) for _ in range(200)] for _ in range(2))
    assert measure_resolution(a, b, rounds=5).smallest_slowdown < measure_resolution(a, b, rounds=3).smallest_slowdown
