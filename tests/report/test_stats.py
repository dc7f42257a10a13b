"""Intervals come from the rounds: they hold the truth as often as they say, although samples are correlated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ryot.report.stats import (
    call_difference,
    compare_means,
    describe_spread,
    lag1_autocorrelation,
    median_of_rounds,
    outlier_positions,
    percentile,
    percentiles,
    ratio_interval,
    t_quantile,
    unpaired_ratio_interval,
    value_interval,
)


def process(
    rng: np.random.Generator, *, scale: float = 5.0, between: float = 0.02, inside: float = 0.03, bursts: float = 0.05
) -> list[float]:
    """30 samples of one process: an offset of its own, then AR(1) at 0.8; a share of the processes sits in a burst."""
    noise = np.empty(30)
    noise[0] = rng.normal(0, inside)
    for i in range(1, 30):
        noise[i] = 0.8 * noise[i - 1] + rng.normal(0, inside * 0.6)
    burst = 0.15 if rng.random() < bursts else 0.0
    return list(scale * np.exp(noise + rng.normal(0, between) + burst))


@pytest.mark.parametrize("rounds", [3, 5])
def test_a_against_a_alarms_in_at_most_5_of_100_windows(rounds):
    rng = np.random.default_rng(7)
    windows = 400
    alarms = 0
    for _ in range(windows):
        a, b = ([process(rng) for _ in range(rounds)] for _ in range(2))
        interval = ratio_interval(a, b)
        alarms += call_difference(interval) != "no difference"
    assert alarms / windows <= 0.05


def test_a_slowdown_of_ten_percent_is_found_on_a_quiet_machine():
    rng = np.random.default_rng(8)
    quiet = {"between": 0.006, "inside": 0.01, "bursts": 0.0}
    found = 0
    for _ in range(150):
        slow = [process(rng, scale=5.5, **quiet) for _ in range(3)]
        fast = [process(rng, **quiet) for _ in range(3)]
        found += call_difference(ratio_interval(slow, fast)) == "higher"
    assert found / 150 >= 0.8


def test_a_value_lies_in_its_interval_and_widens_with_disagreeing_rounds():
    calm = value_interval([[5.0, 5.1, 4.9]] * 3)
    wild = value_interval([[4.0, 4.1], [5.0, 5.1], [6.0, 6.1]])
    assert calm.holds(calm.value) and wild.holds(wild.value)
    assert wild.high / wild.low > calm.high / calm.low


def test_three_rounds_give_students_interval_on_their_logs():
    # Two equal samples per round leave nothing to resample, so only the spread of the rounds is left.
    rounds = [[10.0, 10.0], [11.0, 11.0], [12.0, 12.0]]
    logs = np.log([10, 11, 12])
    half = 6.9646 * logs.std(ddof=1) / math.sqrt(3)
    interval = value_interval(rounds)
    assert interval.value == pytest.approx(11.0)
    assert interval.low == pytest.approx(math.exp(logs.mean() - half), rel=1e-4)
    assert interval.high == pytest.approx(math.exp(logs.mean() + half), rel=1e-4)


def test_rounds_that_agree_by_luck_still_carry_the_noise_inside_them():
    rng = np.random.default_rng(3)
    noisy = list(rng.lognormal(0, 0.2, 30))
    interval = value_interval([noisy, noisy, noisy])
    assert interval.high / interval.low > 1.05


def test_one_round_passes_only_by_a_wide_margin():
    interval = value_interval([[5.0] * 30])
    # 2.326 * 10 %: what a single process can't show is assumed.
    assert interval.high == pytest.approx(5.0 * math.exp(0.23263), rel=1e-6)
    assert interval.rounds == 1


def test_pairing_by_round_takes_a_common_drift_out():
    base = [1.0, 1.5, 2.0]
    a = [[2.0 * x] * 5 for x in base]
    b = [[1.0 * x] * 5 for x in base]
    paired, unpaired = ratio_interval(a, b), unpaired_ratio_interval(a, b)
    assert paired.value == pytest.approx(2.0) and paired.high / paired.low < 1.0001
    assert unpaired.value == pytest.approx(2.0) and unpaired.high / unpaired.low > 2


def test_pairing_by_turn_takes_out_what_moved_both_inside_a_round():
    # The core is half as fast for some seconds of each round; B takes 5 % longer than A in every turn.
    rng = np.random.default_rng(4)
    speeds = [np.repeat(rng.permutation([1.0, 1.0, 2.0, 2.0]), 5) for _ in range(3)]
    a = [list(s) for s in speeds]
    b = [list(1.05 * s * rng.lognormal(0, 0.005, s.size)) for s in speeds]
    interval = ratio_interval(b, a)
    assert interval.holds(1.05) and interval.low > 1.03
    # A turn that only one side had takes no part.
    assert ratio_interval([[*r, 99.0] for r in b], a) == interval


def test_a_round_that_failed_on_one_side_is_left_out():
    interval = ratio_interval([[2.0] * 4, [], [2.0] * 4], [[1.0] * 4, [9.0] * 4, [1.0] * 4])
    assert interval.value == pytest.approx(2.0)
    assert interval.rounds == 2
    assert ratio_interval([[]], [[1.0]]) is None


def test_the_same_samples_give_the_same_interval():
    rng = np.random.default_rng(0)
    rounds = [process(rng) for _ in range(3)]
    assert value_interval(rounds) == value_interval([list(r) for r in rounds])


def test_students_t_at_known_points():
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.49), rel=1e-4)
    assert t_quantile(2) == pytest.approx(0.98 * math.sqrt(2 / (4 * 0.99 * 0.01)), rel=1e-4)
    assert t_quantile(1e9) == pytest.approx(2.32635, rel=1e-4)
    # 13 degrees of freedom stand between two entries of the table: 2.6503 in any printed one.
    assert t_quantile(13) == pytest.approx(2.6503, abs=0.003)


def test_no_percentile_is_given_that_the_samples_cannot_carry():
    assert percentile(range(63), 90) is None
    assert percentile(range(64), 90) is not None
    assert set(percentiles(list(range(129)))) == {"p50", "p90"}
    assert set(percentiles(list(range(661)))) == {"p50", "p90", "p95"}
    assert set(percentiles(list(range(662)))) == {"p50", "p90", "p95", "p99"}


def test_the_causes_of_spread_are_named():
    steady = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0]
    first_run = [1.5, *steady]
    spiked = [*steady[:4], 3.0, *steady[5:]]
    spread = describe_spread([first_run, spiked])
    assert spread["outliers"] == [[0, 0], [1, 4]]
    assert describe_spread([first_run])["first_over_rest"] == pytest.approx(1.5)
    assert outlier_positions(steady) == []
    assert describe_spread([]) == {}


def test_slow_waves_show_as_autocorrelation_even_beside_an_outlier():
    wave = [float(5 + math.sin(i / 4)) for i in range(60)]
    wave[30] = 500.0
    assert lag1_autocorrelation(wave) > 0.7
    assert lag1_autocorrelation([1.0, 1.0, 1.0]) is None


def test_median_of_rounds_weighs_processes_not_samples():
    assert median_of_rounds([[1.0] * 100, [2.0], [3.0]]) == 2.0


def test_means_are_equivalent_only_when_the_whole_interval_lies_inside_the_margin():
    # Welch by hand: both variances 1e-4, standard error sqrt(2e-4 / 3), df 4, t(0.95, 4) = 2.1318.
    found = compare_means([4.00, 4.01, 4.02], [4.00, 4.01, 4.02])
    assert found.high == pytest.approx(2.1318 * math.sqrt(2e-4 / 3), rel=1e-3)
    assert (found.difference, found.verdict) == (0, "equivalent")
    assert compare_means([4.00, 4.10, 4.05], [4.00, 4.10, 4.05]).verdict == "undecided"
    assert compare_means([3.50, 3.51, 3.52], [4.00, 4.01, 4.02]).verdict == "lower"
    assert compare_means([4.00, 4.01, 4.02], [3.50, 3.51, 3.52]).verdict == "higher"
