"""What stops a reinforcement before it wastes its time: rewards, entropy and lengths from which nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ryot.train.gates import GateBreach

#: Steps that a figure is averaged over, so that one bad batch stops nothing.
WINDOW = 10
#: Steps in a row in which no group's rewards differ although not all answers pass.
MAX_EQUAL_STEPS = 20
#: Share of the best reward so far that may be lost, where there was one worth the name.
MAX_REWARD_LOSS, LOW_REWARD = 0.8, 0.05
#: Share of the first steps' entropy that may be lost while answers still fail.
MAX_ENTROPY_LOSS, GOOD_REWARD = 0.99, 0.9
#: Mean length over that of the first steps, where most answers are cut off too.
MAX_LENGTH_RATIO, MOSTLY_CUT = 3.0, 0.5


class StepFigures(NamedTuple):
    """What the gates look at."""

    reward: float
    entropy: float
    """Nats per token."""
    length: float
    """Tokens of an answer."""
    cut: float
    """Share of answers that did not end by themselves."""
    differing: int
    """Groups whose rewards are not all equal."""


@dataclass
class RewardGates:
    """The figures of the last steps beside those of the first."""

    recent: list[StepFigures] = field(default_factory=list)
    first_entropy: float = 0.0
    first_length: float = 0.0
    best_reward: float = 0.0
    equal_steps: int = 0

    def check(self, step: int, figures: StepFigures) -> None:
        """Take the figures of a step. Raises `GateBreach`."""
        solved = figures.reward >= 1
        self.equal_steps = 0 if figures.differing or solved else self.equal_steps + 1
        if self.equal_steps > MAX_EQUAL_STEPS:
            what = "steps in which all rewards of every prompt were equal"
            raise GateBreach("equal_rewards", what, step, self.equal_steps, MAX_EQUAL_STEPS)
        self.recent = [*self.recent, figures][-WINDOW:]
        if len(self.recent) < WINDOW:
            return
        reward, entropy, length, cut, _ = (sum(values) / WINDOW for values in zip(*self.recent))
        self.first_entropy = self.first_entropy or entropy
        self.first_length = self.first_length or length
        self.best_reward = max(self.best_reward, reward)
        checks = (
            ("reward", "share of the best reward that is lost", _lost(reward, self.best_reward), MAX_REWARD_LOSS)
            if self.best_reward > LOW_REWARD
            else None,
            ("entropy", "share of the first entropy that is lost", _lost(entropy, self.first_entropy), MAX_ENTROPY_LOSS)
            if reward < GOOD_REWARD
            else None,
            ("length", "mean length of answers over the first", length / max(self.first_length, 1), MAX_LENGTH_RATIO)
            if cut > MOSTLY_CUT
            else None,
        )
        for gate, what, value, limit in filter(None, checks):
            if value > limit:
                raise GateBreach(gate, what, step, value, limit)


def _lost(now: float, before: float) -> float:
    return 1 - now / before if before > 0 else 0.0
