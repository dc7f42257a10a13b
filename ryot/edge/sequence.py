"""One sequence among others: what was asked for, and how far it has come."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ryot.edge.generate import Completion, FinishReason, TextRow
from ryot.edge.sampling import Sampler
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.tokenizer import Tokenizer
from ryot.errors import RyotError

GREEDY = SamplingParams()


class Constraint(Protocol):
    """Says which tokens may come next, for an output of a given form."""

    def allowed(self) -> np.ndarray:
        """[V] bool: whether each token may come next."""

    def push(self, token: int) -> bool:
        """Take the token that came; whether the output is complete with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt and how it is to be continued."""

    prompt_ids: Sequence[int]
    """At least one token."""
    max_tokens: int
    """0 only looks at the prompt."""
    sampling: SamplingParams = GREEDY
    choice: int = 0
    """Number among several answers to one prompt; each has a random stream of its own."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    continues_text: bool = True
    """Whether the answer goes on with the prompt's text, or begins a new one as in a chat."""
    top_logprobs: int | None = None
    """How many best tokens to report with each token; 0 is the token alone, None nothing."""
    prompt_logprobs: bool = False
    """Whether to report the prompt's tokens too; each then takes a step of its own."""
    owner: str = ""
    """Whose prompt it is: beginnings are shared between prompts of one owner only."""
    constraint: Constraint | None = None
    whole: bool = False
    """Whether only the whole answer is of interest: one event comes, with the last token and all of the text, the
    tokens' probabilities are in `ActiveSequence.logprobs`, and nothing behind the prompt is remembered for others."""


class Drawn(NamedTuple):
    """A token that was drawn together with other rows' tokens."""

    token: int
    logprob: float
    """Of the distribution that it was drawn from."""


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities, before temperature and cuts."""

    logprob: float
    """Of the token that came."""
    top: list[tuple[int, float]]
    """The best tokens, best first."""


class TokenEvent(NamedTuple):
    """What a step did to a sequence: a token came, or it ended without one."""

    sequence: ActiveSequence
    token: int | None
    """None where the sequence ended by an error, or wanted no token."""
    text: str = ""
    """Text that is certain from now on."""
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    error: RyotError | None = None

    @property
    def ends(self) -> bool:
        """Whether nothing more comes from this sequence."""
        return self.finish_reason is not None or self.error is not None


class ActiveSequence:
    """A request under way. All but `cancelled` belongs to the scheduler's thread."""

    def __init__(self, request: Request, tokenizer: Tokenizer, eos: Sequence[int]):
        self.request = request
        self._text = TextRow(
            tokenizer,
            list(request.prompt_ids),
            request.max_tokens,
            () if request.ignore_eos else eos,
            request.stop,
            continues=request.continues_text,
        )
        sampling = request.sampling
        plain = sampling.greedy and request.constraint is None
        self._sampler = None if plain else Sampler(sampling, request.prompt_ids, row=request.choice)
        self._tokenizer, self._eos = tokenizer, () if request.ignore_eos else eos
        assert not (request.whole and (request.stop or request.constraint)), "text comes too late for these"
        #: The sampler of a sequence whose tokens may be drawn together with others'.
        self.uncut: Sampler | None = None
        if (
            sampling.uncut
            and not sampling.changes_logits
            and request.constraint is None
            and not request.prompt_logprobs
        ):
            self.uncut = self._sampler
        #: Whether somebody does not want it any more.
        self.cancelled = False
        #: When it was asked for, and when it first got a row, on `time.perf_counter`'s clock.
        self.queued_s = time.perf_counter()
        self.started_s: float | None = None
        #: Of the prompt: tokens that were not computed because they were known.
        self.cached_tokens = 0
        #: Tokens that drafts foresaw, and how many of them came.
        self.draft_tokens = self.accepted_tokens = 0
        #: Of the prompt's tokens, those whose probabilities were reported; the first one has none.
        self.num_scored = 1
        self.prompt_logprobs: list[Logprobs] = []
        #: Of the tokens of an answer that is wanted whole, where probabilities were asked for.
        self.logprobs: list[float] = []

    @property
    def completion(self) -> Completion:
        """What has been generated so far."""
        return self._text.completion

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.completion.tokens)

    @property
    def ids(self) -> list[int]:
        """All tokens so far."""
        return [*self.request.prompt_ids, *self.completion.tokens]

    @property
    def scores_prompt(self) -> bool:
        """Whether tokens of the prompt are still to be fed one by one."""
        return self.request.prompt_logprobs and self.num_scored < len(self.request.prompt_ids)

    @property
    def prefill_ids(self) -> list[int]:
        """What is to be computed before the first step."""
        return self.ids[: self.num_scored] if self.scores_prompt else self.ids

    def take(self, logits_V: np.ndarray, greedy: int, drawn: Drawn | None = None) -> TokenEvent | int:
        """What follows from the logits after the last token: the token chosen, or a number that is fed and not told of.

        That is the prompt's next token, or one on the way of an answer that is wanted whole. `drawn` is the token where
        it was drawn together with others'.
        """
        request = self.request
        if self.scores_prompt:
            token = request.prompt_ids[self.num_scored]
            self.prompt_logprobs.append(read_logprobs(logits_V, token, request.top_logprobs or 0))
            self.num_scored += 1
            return token
        if not request.max_tokens:
            return TokenEvent(self, None, finish_reason="length")
        constraint, formed = request.constraint, False
        token = greedy
        try:
            if drawn is not None:
                token = drawn.token
            elif self._sampler is not None:
                token = self._sampler.choose(logits_V, None if constraint is None else constraint.allowed())
            if constraint is not None and token not in self._eos:
                formed = constraint.push(token)
        except RyotError as error:
            return TokenEvent(self, None, error=error)
        if request.whole:
            if request.top_logprobs is not None:
                self.logprobs.append(self._logprobs(token, logits_V, drawn).logprob)
            return self._push_whole(token)
        text = self._text.push(token)
        reason = self.completion.finish_reason
        if formed and reason is None:
            reason = "stop"
        logprobs = None if request.top_logprobs is None else self._logprobs(token, logits_V, drawn)
        return TokenEvent(self, token, text, logprobs, reason)

    def _logprobs(self, token: int, logits_V: np.ndarray, drawn: Drawn | None) -> Logprobs:
        top = self.request.top_logprobs or 0
        if drawn is not None and not top and self.request.sampling.temperature == 1:
            return Logprobs(drawn.logprob, [])
        return read_logprobs(logits_V, token, top)

    def _push_whole(self, token: int) -> TokenEvent | int:
        """Take a token of an answer that is told of, and its text made, at its end."""
        completion = self.completion
        completion.tokens.append(token)
        ended = token in self._eos
        if not ended and len(completion.tokens) < self.request.max_tokens:
            return token
        completion.finish_reason = "eos" if ended else "length"
        stream = self._tokenizer.stream(after=self.request.prompt_ids if self.request.continues_text else ())
        tokens = completion.tokens[:-1] if ended else completion.tokens
        completion.text = "".join(map(stream.push, tokens))
        return TokenEvent(self, token, completion.text, None, completion.finish_reason)


def read_logprobs(logits_V: np.ndarray, token: int, top: int) -> Logprobs:
    """The token's log probability and the `top` best ones."""
    logits = logits_V.astype(np.float64)
    best = logits.max()
    total = best + np.log(np.exp(logits - best).sum())
    if not top:
        return Logprobs(float(logits[token] - total), [])
    logprobs = logits - total
    ids = np.argpartition(-logprobs, min(top, logprobs.size - 1))[:top]
    ordered = sorted(((int(i), float(logprobs[i])) for i in ids), key=lambda pair: (-pair[1], pair[0]))
    return Logprobs(float(logprobs[token]), ordered)
