"""Chooses how each matrix is rounded, cheapest first: whole graphs are measured only at the end, and few of them.

Every matrix has options, each with its price, bytes as a rule, and the KL that it is expected to cost. Going from all
the cheapest to all the best, matrix by matrix in the order of KL saved for the price, gives a ladder of mixes. What a
mix really costs is measured on a rung, and where the next one stands follows from a straight line through what was
measured: expected KL leaves out what quantized activations cost and how errors add up, a constant and a factor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ryot.deploy.matrices import Matrix

#: Whole graphs that are measured, at most.
MAX_MEASURED = 6
#: A mix this close to the limit, as a share of it, or to a smaller one that breaks it, in price, is not made smaller.
CLOSE_ENOUGH, CLOSE_PRICE = 0.85, 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format that a matrix may have."""

    label: str
    """Bits and block size."""
    price: int
    """Bytes, or the time of its products: what a mix is to have little of."""
    expected_kl: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Option(Format):
    """One way to round a matrix."""

    matrix: Matrix


FormatT = TypeVar("FormatT", bound=Format)


class Ladder(Generic[FormatT]):
    """Mixes of one option for each matrix, from the cheapest on; rung `i` has the first `i` upgrades."""

    def __init__(self, options: Mapping[str, Sequence[FormatT]]):
        hulls = {name: _lower_hull(of_matrix) for name, of_matrix in options.items()}
        self._cheapest = {name: hull[0] for name, hull in hulls.items()}
        upgrades = [(name, a, b) for name, hull in hulls.items() for a, b in itertools.pairwise(hull)]
        # On a hull each upgrade saves less for its price than the one before it, so their order within a matrix holds.
        self._upgrades = sorted(upgrades, key=lambda u: (-_saved_per_price(u[1], u[2]), u[0], u[2].price))
        self._prices = [sum(o.price for o in self._cheapest.values())]
        self._kl = [sum(o.expected_kl for o in self._cheapest.values())]
        for _, a, b in self._upgrades:
            self._prices.append(self._prices[-1] + b.price - a.price)
            self._kl.append(self._kl[-1] + b.expected_kl - a.expected_kl)

    @property
    def top(self) -> int:
        """The last rung, where every matrix has its best option."""
        return len(self._upgrades)

    def price(self, rung: int) -> int:
        """Of all matrices of a mix."""
        return self._prices[rung]

    def expected_kl(self, rung: int) -> float:
        """Sum of what its matrices are expected to cost."""
        return self._kl[rung]

    def mix(self, rung: int) -> dict[str, FormatT]:
        """The option of each matrix."""
        return {**self._cheapest, **{name: option for name, _, option in self._upgrades[:rung]}}

    def rung_for(self, kl: float) -> int:
        """The lowest rung that is expected to cost at most `kl`; the top where none is."""
        return next((rung for rung, expected in enumerate(self._kl) if expected <= kl), self.top)

    def rung_that_pays(self, times: float) -> int:
        """The last rung up to which each upgrade saves so many times the share of KL that it adds to the price."""
        for rung, (_, a, b) in enumerate(self._upgrades):
            if _saved_per_price(a, b) < times * self._kl[rung] / self._prices[rung]:
                return rung
        return self.top


def find_cheapest(ladder: Ladder[FormatT], measure: Callable[[int], float], limit: float) -> int:
    """The rung of the cheapest mix whose measured loss is within `limit`, after at most `MAX_MEASURED` measurements.

    The top rung where none is within it; the only one, unmeasured, where there is nothing to choose.
    """
    if not ladder.top:
        return 0
    found: dict[int, float] = {}
    failed, passed, rung = -1, None, 0
    for _ in range(MAX_MEASURED):
        found[rung] = measure(rung)
        if found[rung] > limit:
            failed = max(failed, rung)
        elif passed is None or rung < passed:
            passed = rung
        if passed is not None:
            near = failed < 0 or ladder.price(passed) < (1 + CLOSE_PRICE) * ladder.price(failed)
            if near or found[passed] >= CLOSE_ENOUGH * limit or passed - failed == 1:
                return passed
        elif failed == ladder.top:
            return ladder.top
        upper = ladder.top if passed is None else passed - 1
        rung = min(max(_next_rung(ladder, found, limit), failed + 1), upper)
    return ladder.top if passed is None else passed


def _next_rung(ladder: Ladder[FormatT], found: Mapping[int, float], limit: float) -> int:
    """Where a line through the measured rungs nearest to the limit, one alone with the origin, meets just below it."""
    goal = (1 + CLOSE_ENOUGH) / 2 * limit
    points = sorted((ladder.expected_kl(rung), loss) for rung, loss in found.items())
    below = [p for p in points if p[1] <= limit] or [(0.0, 0.0)]
    above = [p for p in points if p[1] > limit]
    if len(above) > 1 and below == [(0.0, 0.0)]:
        below = [above[0]]
        above = above[1:]
    (x0, y0), (x1, y1) = below[-1], above[0]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    return ladder.rung_for(x0 + (goal - y0) / slope) if slope > 0 else ladder.top


def _saved_per_price(a: Format, b: Format) -> float:
    return (a.expected_kl - b.expected_kl) / (b.price - a.price)


def _lower_hull(options: Sequence[FormatT]) -> list[FormatT]:
    """The options that are best for some worth of KL, cheapest first."""
    hull: list[FormatT] = []
    for option in sorted(options, key=lambda o: (o.price, o.expected_kl)):
        if hull and option.expected_kl >= hull[-1].expected_kl:
            continue
        while len(hull) > 1 and _saved_per_price(hull[-2], hull[-1]) <= _saved_per_price(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull
