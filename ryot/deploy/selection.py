"""Chooses how each matrix is rounded, smallest first: whole graphs are measured only at the end, and few of them.

Every matrix has options, each with its bytes and the KL that it is expected to cost. Going from all the smallest to all
the best, matrix by matrix in the order of KL saved per byte, gives a ladder of mixes. What a mix really costs is
measured on a rung, and where the next one stands follows from a straight line through what was measured: expected KL
leaves out what quantized activations cost and how errors add up, which is a constant and a factor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ryot.deploy.matrices import Matrix

#: Whole graphs that are measured, at most.
MAX_MEASURED = 6
#: A mix this close to the limit, as a share of it, or to a smaller one that breaks it, in bytes, is not made smaller.
CLOSE_ENOUGH, CLOSE_BYTES = 0.85, 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format that a matrix may have."""

    label: str
    """Bits and block size."""
    num_bytes: int
    expected_kl: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Option(Format):
    """One way to round a matrix."""

    matrix: Matrix


FormatT = TypeVar("FormatT", bound=Format)


class Ladder(Generic[FormatT]):
    """Mixes of one option for each matrix, from the smallest on; rung `i` has the first `i` upgrades."""

    def __init__(self, options: Mapping[str, Sequence[FormatT]]):
        hulls = {name: _lower_hull(of_matrix) for name, of_matrix in options.items()}
        self._smallest = {name: hull[0] for name, hull in hulls.items()}
        upgrades = [(name, a, b) for name, hull in hulls.items() for a, b in itertools.pairwise(hull)]
        # On a hull each upgrade saves less per byte than the one before it, so their order within a matrix holds.
        self._upgrades = sorted(upgrades, key=lambda u: (-_saved_per_byte(u[1], u[2]), u[0], u[2].num_bytes))
        self._bytes = [sum(o.num_bytes for o in self._smallest.values())]
        self._kl = [sum(o.expected_kl for o in self._smallest.values())]
        for _, a, b in self._upgrades:
            self._bytes.append(self._bytes[-1] + b.num_bytes - a.num_bytes)
            self._kl.append(self._kl[-1] + b.expected_kl - a.expected_kl)

    @property
    def top(self) -> int:
        """The last rung, where every matrix has its best option."""
        return len(self._upgrades)

    def num_bytes(self, rung: int) -> int:
        """Bytes of all matrices of a mix."""
        return self._bytes[rung]

    def expected_kl(self, rung: int) -> float:
        """Sum of what its matrices are expected to cost."""
        return self._kl[rung]

    def mix(self, rung: int) -> dict[str, FormatT]:
        """The option of each matrix."""
        return {**self._smallest, **{name: option for name, _, option in self._upgrades[:rung]}}

    def rung_for(self, kl: float) -> int:
        """The lowest rung that is expected to cost at most `kl`; the top where none is."""
        return next((rung for rung, expected in enumerate(self._kl) if expected <= kl), self.top)

    def rung_that_pays(self, times: float) -> int:
        """The last rung up to which each upgrade saves so many times the share of KL that it adds in bytes."""
        for rung, (_, a, b) in enumerate(self._upgrades):
            if _saved_per_byte(a, b) < times * self._kl[rung] / self._bytes[rung]:
                return rung
        return self.top


def find_smallest(ladder: Ladder[FormatT], measure: Callable[[int], float], limit: float) -> int:
    """The rung of the smallest mix whose measured loss is within `limit`, after at most `MAX_MEASURED` measurements.

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
            near = failed < 0 or ladder.num_bytes(passed) < (1 + CLOSE_BYTES) * ladder.num_bytes(failed)
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


def _saved_per_byte(a: Format, b: Format) -> float:
    return (a.expected_kl - b.expected_kl) / (b.num_bytes - a.num_bytes)


def _lower_hull(options: Sequence[FormatT]) -> list[FormatT]:
    """The options that are smallest for some price of KL in bytes, smallest first."""
    hull: list[FormatT] = []
    for option in sorted(options, key=lambda o: (o.num_bytes, o.expected_kl)):
        if hull and option.expected_kl >= hull[-1].expected_kl:
            continue
        while len(hull) > 1 and _saved_per_byte(hull[-2], hull[-1]) <= _saved_per_byte(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull
