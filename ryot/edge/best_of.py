"""More computation for a better answer: several candidates from one prompt, and the one that a verifier likes best.

The candidates are sequences of one scheduler, so the prompt is computed once, each leaves when it ends, and the others
are given up on as soon as enough have passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryot.edge.generate import Completion
from ryot.edge.verifiers import Verdict, Verifier
from ryot.errors import ConfigError

if TYPE_CHECKING:
    from ryot.edge.scheduler import Scheduler
    from ryot.edge.sequence import ActiveSequence, Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One continuation and what the verifier says about it."""

    completion: Completion
    verdict: Verdict
    choice: int
    """Its number, and so its random stream."""


@dataclass(slots=True)
class Ballot:
    """The verdicts on candidates as they end, and when no more are wanted."""

    verifier: Verifier
    prompt: str
    wanted: int = 1
    """So many that pass are enough."""
    passed: int = 0

    def add(self, text: str) -> Verdict | None:
        """The verdict on a candidate that has ended; None where it waits for the others."""
        if self.verifier.needs_all:
            return None
        (verdict,) = self.verifier.score(self.prompt, [text])
        self.passed += verdict.passed
        return verdict

    @property
    def decided(self) -> bool:
        """Whether the other candidates need not end."""
        return self.passed >= self.wanted

    def close(self, texts: Sequence[str], verdicts: Sequence[Verdict | None]) -> list[Verdict]:
        """The verdicts on all that ended."""
        if self.verifier.needs_all:
            return self.verifier.score(self.prompt, texts)
        return [verdict for verdict in verdicts if verdict is not None]


def choose_best(scheduler: Scheduler, requests: Sequence[Request], prompt: str, verifier: Verifier) -> list[Candidate]:
    """The candidates that ended, best reward first, equal ones in the order of `requests`.

    `requests` are one prompt's, with a `choice` each. As soon as one passes, the others are given up on. Raises
    `ConfigError` where the sampling would make all of them the same, and the first error of any.
    """
    if len(requests) > 1 and requests[0].sampling.temperature == 0:
        raise ConfigError("temperature: got 0, which makes all candidates the same, expected a number above 0")
    ballot = Ballot(verifier, prompt)
    sequences = [scheduler.add(request) for request in requests]
    verdicts: dict[ActiveSequence, Verdict | None] = {}
    while not scheduler.idle:
        for event in scheduler.step():
            if event.error is not None:
                raise event.error
            if event.ends and not ballot.decided:
                verdicts[event.sequence] = ballot.add(event.sequence.completion.text)
        if ballot.decided:
            for sequence in sequences:
                sequence.cancelled = sequence not in verdicts
    ended = [sequence for sequence in sequences if sequence in verdicts]
    final = ballot.close([s.completion.text for s in ended], [verdicts[s] for s in ended])
    candidates = [
        Candidate(completion=sequence.completion, verdict=verdict, choice=sequence.request.choice)
        for sequence, verdict in zip(ended, final, strict=True)
    ]
    return sorted(candidates, key=lambda candidate: -candidate.verdict.reward)
