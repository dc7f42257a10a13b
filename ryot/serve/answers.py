"""What text and chat completions have in common once they run: choices that grow, usage, and the stream of events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Protocol

from ryot.edge.sequence import Logprobs, TokenEvent
from ryot.errors import RyotError
from ryot.serve.errors import ApiError, api_error
from ryot.serve.model import ServedModel
from ryot.serve.runner import Answers
from ryot.serve.verified import Verification

#: JSON of an answer.
Body = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has come."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def mean_logprob(self) -> float:
        """How likely the model found it, a token."""
        return sum(item.logprob for item in self.logprobs) / max(1, len(self.logprobs))

    def push(self, event: TokenEvent) -> None:
        """Take what came."""
        self.text += event.text
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprobs is not None:
            self.logprobs.append(event.logprobs)
        if event.finish_reason is not None:
            # OpenAI makes no difference between a stop string and the end that the model sets.
            self.finish_reason = "length" if event.finish_reason == "length" else "stop"


class Format(Protocol):
    """How one kind of request is answered."""

    answers: Answers
    """From `submit` on."""
    num_per_prompt: int
    """Choices to each prompt; they come one after the other."""
    include_usage: bool
    verification: Verification | None
    """What chooses among candidates, where something does."""
    has_plain_chunks: bool
    """Whether pieces of one choice that hold text alone differ in that text alone, from the second one on."""

    @property
    def stream(self) -> bool:
        """Whether the answer is sent as it grows."""

    def submit(self) -> None:
        """Queue what was read, from asyncio's thread. Raises `ApiError`."""

    def whole(self, choices: Sequence[Choice]) -> Body:
        """The answer in one piece."""

    def first_chunks(self) -> Iterable[Body]:
        """What a stream begins with."""

    def chunk(self, piece: Choice) -> Body:
        """A piece of a stream: what has come since the last one."""

    def last_chunks(self) -> Iterable[Body]:
        """What a stream ends with: its usage, where that was asked for."""


async def collect(answer: Format) -> list[Choice]:
    """All choices, when they have ended. Raises `ApiError`."""
    numbers = {sequence: index for index, sequence in enumerate(answer.answers.sequences)}
    choices = [Choice(index) for index in range(len(numbers))]
    try:
        async for events in answer.answers:
            for event in events:
                choice = choices[numbers[event.sequence]]
                choice.push(event)
                if event.ends and answer.verification is not None and await answer.verification.add(choice):
                    start = choice.index - choice.index % answer.num_per_prompt
                    answer.answers.give_up(answer.answers.sequences[start : start + answer.num_per_prompt])
        if answer.verification is not None:
            await answer.verification.close(choices)
    except RyotError as error:
        raise api_error(error) from error
    finally:
        answer.answers.close()
    return choices


async def stream(answer: Format, on_error: Callable[[ApiError], None]) -> AsyncIterator[bytes]:
    """Server-sent events as choices grow; an error becomes the last one."""
    numbers = {sequence: index for index, sequence in enumerate(answer.answers.sequences)}
    writer = _ChunkWriter(answer)
    try:
        if first := b"".join(_event(body | writer.extra) for body in answer.first_chunks()):
            yield first
        async for events in answer.answers:
            if data := b"".join(writer.write(numbers[event.sequence], event) for event in events):
                yield data
        yield b"".join(_event(body) for body in answer.last_chunks()) + b"data: [DONE]\n\n"
    except RyotError as error:
        refused = api_error(error)
        on_error(refused)
        yield _event(refused.body())
    finally:
        answer.answers.close()


class _ChunkWriter:
    """Writes the pieces of a stream; those that differ in their text alone are not built anew for every token."""

    def __init__(self, answer: Format):
        self.extra: Body = {"usage": None} if answer.include_usage else {}
        self._answer = answer
        #: By choice, from its second piece on, since the first may be different: what stands before and after the text.
        self._around: dict[int, tuple[bytes, bytes] | None] = {}

    def write(self, index: int, event: TokenEvent) -> bytes:
        if event.logprobs is None and not event.ends and (around := self._around.get(index)):
            # A token that completes no text says nothing, unless somebody wants its probability.
            return around[0] + _quote(event.text) + around[1] if event.text else b""
        piece = Choice(index)
        piece.push(event)
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return b""
        data = _event(self._answer.chunk(piece) | self.extra)
        if self._answer.has_plain_chunks and event.logprobs is None and not event.ends:
            body = _event(self._answer.chunk(Choice(index, _MARK)) | self.extra)
            before, mark, after = body.partition(_quote(_MARK))
            self._around[index] = (before, after) if mark else None
        return data


def count_usage(answers: Answers, num_per_prompt: int) -> Body:
    """Tokens of prompts, each counted once, and of all choices."""
    prompts = answers.sequences[::num_per_prompt]
    prompt_tokens = sum(len(sequence.request.prompt_ids) for sequence in prompts)
    completion_tokens = sum(sequence.completion_tokens for sequence in answers.sequences)
    accepted = sum(sequence.accepted_tokens for sequence in answers.sequences)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(sequence.draft_tokens for sequence in answers.sequences) - accepted,
        },
        "prompt_tokens_details": {"cached_tokens": sum(sequence.cached_tokens for sequence in prompts)},
    }


def describe_token(model: ServedModel, token: int, logprob: float) -> Body:
    """A token as chat completions show it."""
    data = model.tokenizer.token_bytes(token)
    return {"token": model.token_text(token), "logprob": logprob, "bytes": list(data)}


#: A text that no model's name holds.
_MARK = "\x00text\x00"


def _quote(text: str) -> bytes:
    return encode_basestring(text).encode("utf-8", "backslashreplace")


def _event(body: Body) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
