"""Medians, intervals and the look for noise in timings taken by fresh, interleaved processes.

Samples inside one process share its memory layout, its core and its moment, so they are strongly correlated: thirty
of them are far from thirty independent facts. The unit that repeats is the *round* (one fresh process per case). Every
interval here therefore comes from the rounds, on the log scale, with Student's factor for how few they are.

The standard error has two levels: the spread of the round medians, and what a bootstrap of the samples inside the
rounds gives. The first already contains the second; the larger of the two counts, for three rounds may agree by luck.
A percentile interval of a bootstrap over rounds is far too narrow at 3 to 5 rounds (it cannot leave their range:
Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 4), hence Student's t.

Intervals are at 98 %: with 95 % a case would differ from itself in 5 of 100 windows on average, so in more than 5 of
them almost every other time. At 98 % more than 5 of 100 come up in 3 recordings of 200.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from ryot.report.rows import Spread

Rounds = Sequence[Sequence[float]]
"""One inner list of samples per round."""

RESAMPLES = 400
#: Between-process spread (standard deviation of the log) taken for granted where one round cannot show it: several
#: times what a quiet machine has, so that a single round can pass or fail a limit only by a wide margin.
ONE_ROUND_SPREAD = 0.10
#: Fewest samples that carry a percentile: MLPerf's early-stopping rule at confidence 0.99.
PERCENTILE_COUNTS = {50: 1, 90: 64, 95: 130, 99: 662}

#: Student's t at 0.95 and 0.99 by degrees of freedom; the last is the normal distribution's.
_T: dict[float, tuple[float, float]] = {
    1: (6.3138, 31.8205), 2: (2.9200, 6.9646), 3: (2.3534, 4.5407), 4: (2.1318, 3.7469), 5: (2.0150, 3.3649),
    6: (1.9432, 3.1427), 7: (1.8946, 2.9980), 8: (1.8595, 2.8965), 9: (1.8331, 2.8214), 10: (1.8125, 2.7638),
    12: (1.7823, 2.6810), 15: (1.7531, 2.6025), 20: (1.7247, 2.5280), 30: (1.6973, 2.4573), 60: (1.6706, 2.3901),
    120: (1.6577, 2.3578), math.inf: (1.6449, 2.3263),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 98 % interval; `rounds` says how many processes stand behind it."""

    value: float
    low: float
    high: float
    rounds: int

    def holds(self, number: float) -> bool:
        """Whether `number` lies in the interval, ends included."""
        return self.low <= number <= self.high


def t_quantile(df: float, level: float = 0.99) -> float:
    """Student's t at `level` (0.95 or 0.99) for `df` degrees of freedom: a table, linear in 1/df in between."""
    assert df >= 1 and level in (0.95, 0.99), (df, level)
    column = 0 if level == 0.95 else 1
    return float(np.interp(1 / df, [1 / d for d in reversed(_T)], [t[column] for t in reversed(_T.values())]))


def round_medians(rounds: Rounds) -> list[float]:
    """The median of each round that has samples."""
    return [float(np.median(r)) for r in rounds if len(r)]


def median_of_rounds(rounds: Rounds) -> float:
    """The median over rounds of each round's median: what the tables print."""
    return float(np.median(round_medians(rounds)))


def value_interval(rounds: Rounds, *, seed: int = 0) -> Interval | None:
    """The median over rounds with its interval; None when no round has samples. Samples must be above 0."""
    return _interval(rounds, seed, 1.0)


def ratio_interval(a: Rounds, b: Rounds, *, seed: int = 0) -> Interval | None:
    """The median ratio of a to b over rounds, with its interval; None when no round has samples of both.

    Round k of `a` was measured beside round k of `b`, and by turns: sample i of one is a moment away from sample i of
    the other. So the ratio is taken turn by turn, which takes out what moved both (a core that is slow for a second, a
    warm afternoon). Turns that only one of them had are left out.
    """
    turns = [[x / y for x, y in zip(p, q, strict=False)] for p, q in zip(a, b, strict=False)]
    return _interval(turns, seed, math.sqrt(2))


def unpaired_ratio_interval(a: Rounds, b: Rounds, *, seed: int = 0) -> Interval | None:
    """The ratio of two recordings that were not interleaved (Welch's interval on the logs of the round medians)."""
    left, right = value_interval(a, seed=seed), value_interval(b, seed=seed)
    if left is None or right is None:
        return None
    # A half width is t times the standard error; going back gives each side's error and degrees of freedom.
    sides = []
    for interval in (left, right):
        df = float(max(interval.rounds - 1, 1))
        factor = t_quantile(df) if interval.rounds > 1 else t_quantile(math.inf)
        sides.append((math.log(interval.high / interval.low) / 2 / factor, df))
    (ea, da), (eb, db) = sides
    variance = ea**2 + eb**2
    df = max(1.0, variance**2 / (ea**4 / da + eb**4 / db)) if variance > 0 else float(da + db)
    half = t_quantile(df) * math.sqrt(variance)
    ratio = left.value / right.value
    return Interval(ratio, ratio * math.exp(-half), ratio * math.exp(half), min(left.rounds, right.rounds))


#: Nats per token within which two final losses count as equal: one and a half times the spread between seeds.
EQUIVALENCE_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Two one-sided tests at 5 % (Schuirmann 1987): the 90 % interval of a - b against a margin."""

    difference: float
    low: float
    high: float
    margin: float

    @property
    def verdict(self) -> Literal["equivalent", "lower", "higher", "undecided"]:
        """`equivalent` when the interval lies inside the margin; else which side of 0 it lies on, if any."""
        if -self.margin < self.low and self.high < self.margin:
            return "equivalent"
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "undecided"


def compare_means(a: Sequence[float], b: Sequence[float], margin: float = EQUIVALENCE_MARGIN) -> Equivalence:
    """Whether the means of two sets of final losses agree within `margin` (Welch's interval); two of each at least."""
    assert len(a) > 1 and len(b) > 1
    ea, eb = (float(np.var(x, ddof=1)) / len(x) for x in (a, b))
    variance = ea + eb
    df = variance**2 / (ea**2 / (len(a) - 1) + eb**2 / (len(b) - 1)) if variance else float(len(a) + len(b) - 2)
    half = t_quantile(df, 0.95) * math.sqrt(variance)
    difference = float(np.mean(a) - np.mean(b))
    return Equivalence(difference, difference - half, difference + half, margin)


Difference = Literal["lower", "higher", "no difference"]


def call_difference(interval: Interval) -> Difference:
    """`no difference` when the ratio's interval holds 1, else on which side of 1 it lies."""
    if interval.holds(1.0):
        return "no difference"
    return "lower" if interval.high < 1 else "higher"


def _interval(rounds: Rounds, seed: int, one_round_factor: float) -> Interval | None:
    """Student's interval around the mean log of the round medians, with the median of them as its value."""
    kept = [r for r in rounds if len(r)]
    if not kept:
        return None
    logs = np.log(round_medians(kept))
    inside = float(_bootstrapped_logs(kept, np.random.default_rng(seed)).mean(axis=0).std())
    if len(kept) == 1:
        half = t_quantile(math.inf) * math.hypot(ONE_ROUND_SPREAD * one_round_factor, inside)
    else:
        between = float(logs.std(ddof=1)) / math.sqrt(len(kept))
        half = t_quantile(len(kept) - 1) * max(between, inside)
    centre, value = float(logs.mean()), math.exp(float(np.median(logs)))
    # The printed value is the median; for very skewed rounds it may lie outside an interval around the mean.
    low, high = min(math.exp(centre - half), value), max(math.exp(centre + half), value)
    return Interval(value, low, high, len(kept))


def _bootstrapped_logs(rounds: Rounds, rng: np.random.Generator) -> np.ndarray:
    """[R, RESAMPLES] logs of medians of circular blocks drawn inside each round.

    Blocks of about sqrt(n) samples keep most of the correlation between neighbours in each draw.
    """
    out = np.empty((len(rounds), RESAMPLES))
    for row, samples in zip(out, rounds):
        values = np.log(np.asarray(samples, dtype=np.float64))
        count = len(values)
        if count < 3:
            row[:] = np.median(values)
            continue
        block = max(1, round(math.sqrt(count)))
        starts = rng.integers(count, size=(RESAMPLES, -(-count // block)))
        index = (starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :count] % count
        row[:] = np.median(values[index], axis=1)
    return out


def percentile(samples: Sequence[float], p: int) -> float | None:
    """The `p`-th percentile, or None when there are too few samples to carry it (see PERCENTILE_COUNTS)."""
    return float(np.percentile(samples, p)) if len(samples) >= PERCENTILE_COUNTS[p] else None


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Every percentile that the samples carry, as {"p50": …}."""
    found = {f"p{p}": percentile(samples, p) for p in PERCENTILE_COUNTS}
    return {name: value for name, value in found.items() if value is not None}


def lag1_autocorrelation(samples: Sequence[float]) -> float | None:
    """Correlation of each sample's rank with the next one's; None for fewer than 3 samples or no spread.

    Ranks, because one outlier would otherwise hide any correlation of the rest.
    """
    values = np.asarray(samples, dtype=np.float64)
    if len(values) < 3 or float(values.std()) == 0:
        return None
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    centred = ranks - ranks.mean()
    return float((centred[:-1] * centred[1:]).sum() / (centred**2).sum())


def outlier_positions(samples: Sequence[float], *, deviations: float = 5.0) -> list[int]:
    """Positions of samples farther than `deviations` robust standard deviations above the median.

    The robust deviation is 1.4826 times the median absolute deviation, at least 2 % of the median (timers have steps).
    """
    values = np.asarray(samples, dtype=np.float64)
    if len(values) < 5:
        return []
    middle = float(np.median(values))
    spread = max(1.4826 * float(np.median(np.abs(values - middle))), 0.02 * abs(middle))
    return [int(i) for i in np.flatnonzero(values > middle + deviations * spread)]


def describe_spread(rounds: Rounds) -> Spread:
    """What the spread of one case comes from: first-run effect, outliers, correlation inside and between processes."""
    kept = [list(r) for r in rounds if len(r)]
    if not kept:
        return {}
    medians = round_medians(kept)
    correlations = [c for c in map(lag1_autocorrelation, kept) if c is not None]
    rest = [float(np.median(r[1:])) for r in kept if len(r) > 1]
    firsts = [r[0] for r in kept if len(r) > 1]
    return {
        "round_medians": medians,
        "between_rounds": max(medians) / min(medians) - 1,
        "first_over_rest": float(np.median(np.divide(firsts, rest))) if rest else None,
        "lag1": float(np.median(correlations)) if correlations else None,
        "outliers": [[k, i] for k, r in enumerate(rounds) for i in outlier_positions(r)],
    }
