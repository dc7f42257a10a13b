"""Several tokens in one call where a text repeats itself: drafts from what was said before, checked by the model.

A draft is what followed the last few tokens when they came before (prompt lookup). The model reads the last token and
the draft together; the logits of each position then choose a token as they would have one by one, and the draft is kept
as far as it agrees. So no token changes, greedy, drawn or constrained, but for the rounding of a longer call: where a
graph rounds activations to int8 that moved log probabilities of SmolLM2-135M by up to 0.15 (int8) and 0.23 (int4), so
nobody drafts who was not told to.

It pays where a call of some tokens takes little longer than one of one, which is measured on the calls themselves, and
where drafts are right often enough, which each sequence shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Tokens that must have come before in the same order for a draft to be made.
NGRAM = 3
#: Drafts are of as many tokens: the next size after one that was right, the one before after one that was not.
SIZES = (2, 4, 7)
#: Calls by which it is known whether drafts can pay at all; the first ones prepare buffers.
TRIALS = 8
#: Weight of the newest call in what calls take, and of the newest draft in what drafts gain.
SMOOTHING = 0.25
#: Tokens that a sequence goes without drafts after they have not paid; doubled each time.
PAUSE_TOKENS = 32


@dataclass(slots=True)
class DraftCosts:
    """What calls with drafts take on this machine, in steps of one token."""

    by_size: dict[int, float] = field(default_factory=dict)
    num_shortest: int = 0
    """Calls with a draft of the shortest size."""

    def observe(self, size: int, steps: float) -> None:
        """Take note of a call."""
        self.num_shortest += size == SIZES[0]
        before = self.by_size.get(size, steps)
        self.by_size[size] = before + SMOOTHING * (steps - before)

    @property
    def never_pay(self) -> bool:
        """Whether even the shortest draft is not worth its call when all of it is right."""
        return self.num_shortest >= TRIALS and not self.pays(SIZES[0], SIZES[0] + 1)

    def pays(self, size: int, gained: float) -> bool:
        """Whether a draft that gains so many tokens is worth its call; True where none was made yet."""
        return gained > self.by_size.get(size, 0.0)


class Drafter:
    """Drafts of one sequence."""

    def __init__(self, costs: DraftCosts):
        self._costs = costs
        self._ids: list[int] = []
        #: Where each n-gram was followed last.
        self._places: dict[tuple[int, ...], int] = {}
        self._level = 0
        #: Tokens that a call came to lately, by size of its draft; the one that comes in any case included.
        self._gained = {size: float(size + 1) for size in SIZES}
        self._paused_until = 0
        self._pause = PAUSE_TOKENS

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """What may follow `ids`, which grow from call to call; at most `most` tokens, perhaps none."""
        self._read(ids)
        if len(ids) < self._paused_until or most < SIZES[0]:
            return []
        place = self._places.get(tuple(self._ids[-NGRAM:]))
        if place is None:
            return []
        draft: list[int] = []
        for at in range(place, place + SIZES[self._level]):
            # A text that repeats at a short distance is taken to go on so.
            draft.append(self._ids[at] if at < len(self._ids) else draft[at - len(self._ids)])
        return draft[: max(size for size in SIZES if size <= most)]

    def learn(self, size: int, accepted: int) -> None:
        """Take note that of a draft of `size` tokens so many were right."""
        self._gained[size] += SMOOTHING * (1 + accepted - self._gained[size])
        self._level = min(self._level + 1, len(SIZES) - 1) if accepted == size else max(self._level - 1, 0)
        if not self._costs.pays(size, self._gained[size]):
            self._paused_until = len(self._ids) + 1 + accepted + self._pause
            self._pause *= 2
            self._level = 0
            self._gained = {size: float(size + 1) for size in SIZES}

    def _read(self, ids: Sequence[int]) -> None:
        known = len(self._ids)
        self._ids += ids[known:]
        # The last n-gram has not been followed yet.
        for end in range(max(known, NGRAM), len(ids)):
            self._places[tuple(self._ids[end - NGRAM : end])] = end
