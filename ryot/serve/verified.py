"""Answers that a program checks: which candidate is best, when no more are wanted, and what is said about each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ryot.edge.best_of import Ballot
from ryot.edge.verifiers import Rights, Verdict, Verifier, build_verifier
from ryot.errors import ConfigError
from ryot.serve.errors import invalid
from ryot.serve.fields import Fields

if TYPE_CHECKING:
    from ryot.serve.answers import Choice


def read_verifier(fields: Fields, rights: Rights) -> Verifier | None:
    """The request's `verifier`. Raises `ApiError`."""
    if fields.table("verifier") is None:
        return None
    table = fields.get("verifier")
    assert isinstance(table, dict)
    try:
        return build_verifier(table, rights)
    except ConfigError as error:
        name, _, message = str(error).partition(": ")
        raise invalid(name, message) from error


class Verification:
    """The verdicts on the candidates of each prompt of a request."""

    def __init__(self, verifier: Verifier, prompts: Sequence[str], num_per_prompt: int, wanted: int):
        self.verifier = verifier
        self._num_per_prompt = num_per_prompt
        self._ballots = [Ballot(verifier, prompt, wanted) for prompt in prompts]
        self._verdicts: dict[int, Verdict | None] = {}

    async def add(self, choice: Choice) -> bool:
        """Judge a candidate that has ended; whether the others of its prompt need not end."""
        ballot = self._ballots[choice.index // self._num_per_prompt]
        if ballot.decided:
            return True
        # In a thread of its own: it may run a program, and meanwhile others' answers go on.
        self._verdicts[choice.index] = await asyncio.to_thread(ballot.add, choice.text)
        return ballot.decided

    async def close(self, choices: Sequence[Choice]) -> None:
        """Judge what waits for all candidates of its prompt."""
        for number, ballot in enumerate(self._ballots):
            ended = [c for c in self._of_prompt(choices, number) if c.index in self._verdicts]
            known = [self._verdicts[choice.index] for choice in ended]
            final = await asyncio.to_thread(ballot.close, [choice.text for choice in ended], known)
            self._verdicts.update(zip((choice.index for choice in ended), final, strict=True))

    def best(self, choices: Sequence[Choice], count: int) -> list[Choice]:
        """Of one prompt's candidates the `count` best: by reward, then by how likely the model found them."""
        judged = [choice for choice in choices if choice.index in self._verdicts]
        return sorted(judged, key=lambda choice: (-self.reward(choice), -choice.mean_logprob))[:count]

    def reward(self, choice: Choice) -> float:
        """Of a candidate that ended."""
        verdict = self._verdicts[choice.index]
        assert verdict is not None
        return verdict.reward

    def body(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What the answer says about all candidates."""
        return {"kind": self.verifier.kind, "paths": [self._path(choice) for choice in choices]}

    def _path(self, choice: Choice) -> dict[str, Any]:
        verdict = self._verdicts.get(choice.index)
        judged: dict[str, Any] = {"reward": None, "detail": "given up on: enough had passed"}
        if verdict is not None:
            judged = {"reward": verdict.reward, "detail": verdict.detail}
        prompt, index = divmod(choice.index, self._num_per_prompt)
        where = {"index": index} if len(self._ballots) == 1 else {"prompt": prompt, "index": index}
        return where | judged | {"text": choice.text, "completion_tokens": len(choice.tokens)}

    def _of_prompt(self, choices: Sequence[Choice], prompt: int) -> Sequence[Choice]:
        return choices[prompt * self._num_per_prompt : (prompt + 1) * self._num_per_prompt]
