"""How many tokens of a prompt fit between two steps of running sequences, by what pieces took before."""

from __future__ import annotations

from ryot.edge.engine import PIECE_TOKENS

#: Tokens of a piece: few sizes, since a call of a size that came before is bound already.
PIECE_SIZES = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, PIECE_TOKENS)
#: The smallest piece but one, at which a row of a product costs little more than in a large one, is taken where time is
#: left for less, unless it takes longer than so many steps, as behind a long past.
MANY_STEPS = 3.0
#: Weight of the newest time of a piece where it is shorter than those before.
SMOOTHING = 0.2


class PieceCosts:
    """Time that a token takes in a piece of each size.

    A token of a small piece takes longer than one of a large piece. One figure for all sizes would say after small
    pieces that only small ones fit, and stay with them.
    """

    def __init__(self) -> None:
        self._token_s: dict[int, float] = {}

    @property
    def known(self) -> bool:
        """Whether a piece was timed."""
        return bool(self._token_s)

    def observe(self, size: int, seconds: float) -> None:
        """Take note of a piece."""
        named = max((s for s in PIECE_SIZES if s <= size), default=PIECE_SIZES[0])
        now = seconds / size
        before = self._token_s.get(named, now)
        # What takes longer behind a longer past is believed at once: it goes on to.
        token_s = self._token_s[named] = max(now, before + SMOOTHING * (now - before))
        for other, known in self._token_s.items():
            self._token_s[other] = min(known, token_s) if other > named else max(known, token_s)

    def fitting(self, budget_s: float, step_s: float) -> int:
        """Tokens that take `budget_s`, where a step takes `step_s`; the smallest piece at least."""
        largest, usual = PIECE_SIZES[-1], PIECE_SIZES[1]
        if largest * self._cost(largest) <= budget_s:
            return int(budget_s / self._cost(largest)) // largest * largest
        size = max((s for s in PIECE_SIZES if s * self._cost(s) <= budget_s), default=PIECE_SIZES[0])
        return max(size, usual) if usual * self._cost(usual) <= MANY_STEPS * step_s else size

    def _cost(self, size: int) -> float:
        """Of the next smaller size that is known, which a token of this one does not exceed; else of the smallest."""
        below = [known for known in self._token_s if known <= size]
        return self._token_s[max(below) if below else min(self._token_s)]
