"""`/v1/completions`: texts and token ids that are continued."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence

from ryot.edge.sequence import Logprobs, Request
from ryot.errors import ConfigError, RyotError
from ryot.serve.answers import Body, Choice, count_usage
from ryot.serve.errors import api_error, invalid
from ryot.serve.fields import Fields, show
from ryot.serve.model import ServedModel
from ryot.serve.params import MAX_CHOICES, MAX_LOGPROBS, SHARED, read_params
from ryot.serve.runner import Answers

#: OpenAI's default.
DEFAULT_MAX_TOKENS = 16
FIELDS = (*SHARED, "prompt", "echo", "suffix", "add_special_tokens")


class TextCompletion:
    """One request for continuations."""

    has_plain_chunks = True
    answers: Answers

    def __init__(self, fields: Fields, model: ServedModel, owner: str):
        """Read the request, from any thread. Raises `ApiError`."""
        fields.refuse_unknown(FIELDS)
        if fields.text("suffix"):
            raise invalid("suffix", "is not supported: the models here only go on with a text")
        self._model = model
        self._params = params = read_params(
            fields, model, max_tokens_names=("max_tokens",), default_max=DEFAULT_MAX_TOKENS
        )
        self._echo = fields.flag("echo")
        self._logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
        self.num_per_prompt = params.num_candidates
        self._prompts = _read_prompts(fields, model, with_text=self._echo or params.verifier is not None)
        if len(self._prompts) * self.num_per_prompt > MAX_CHOICES:
            raise invalid(
                "prompt",
                f"{len(self._prompts)} prompts with {self.num_per_prompt} answers each are more than {MAX_CHOICES}",
            )
        texts = [text for text, _ in self._prompts]
        self.verification = params.verify(texts)
        #: Of a stream: choices whose prompt was sent, and how much text each has.
        self._echoed: set[int] = set()
        self._offsets: dict[int, int] = {}
        self.include_usage = params.include_usage
        self._head: Body = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
        self._head |= {"created": int(time.time()), "model": model.name}
        requests = [
            self._request(ids, choice, owner) for _, ids in self._prompts for choice in range(self.num_per_prompt)
        ]
        try:
            self._sequences = model.runner.build(requests)
        except RyotError as error:
            longest = max(len(ids) for _, ids in self._prompts)
            raise api_error(error, params.too_long("prompt", longest, model.engine.max_len)) from error

    def submit(self) -> None:
        runner = self._model.runner
        self.answers = runner.submit(self._sequences, num_prompts=len(self._prompts), n=self._params.n)

    @property
    def stream(self) -> bool:
        """Whether the answer is sent as it grows."""
        return self._params.stream

    def whole(self, choices: Sequence[Choice]) -> Body:
        kept = []
        for start in range(0, len(choices), self.num_per_prompt):
            candidates = choices[start : start + self.num_per_prompt]
            if self.verification is not None:
                candidates = self.verification.best(candidates, self._params.n)
            elif self._params.n < self.num_per_prompt:
                candidates = sorted(candidates, key=lambda choice: -choice.mean_logprob)[: self._params.n]
            kept += [self._body(choice, choice.index // self.num_per_prompt) for choice in candidates]
        for index, body in enumerate(kept):
            body["index"] = index
        said = {} if self.verification is None else {"verification": self.verification.body(choices)}
        return self._head | {"choices": kept, "usage": count_usage(self.answers, self.num_per_prompt)} | said

    def first_chunks(self) -> Iterable[Body]:
        return ()

    def chunk(self, piece: Choice) -> Body:
        first = self._echo and piece.index not in self._echoed
        self._echoed.add(piece.index)
        return self._head | {"choices": [self._body(piece, piece.index // self.num_per_prompt, echo=first)]}

    def last_chunks(self) -> Iterable[Body]:
        if self.include_usage:
            yield self._head | {"choices": [], "usage": count_usage(self.answers, self.num_per_prompt)}

    def _request(self, ids: Sequence[int], choice: int, owner: str) -> Request:
        params, scored = self._params, self._logprobs
        if params.n < self.num_per_prompt and scored is None:
            scored = 0
        room = self._model.engine.max_len - len(ids)
        return Request(
            prompt_ids=ids,
            max_tokens=max(room, 1) if params.max_tokens is None else params.max_tokens,
            sampling=params.sampling,
            choice=choice,
            stop=params.stop,
            ignore_eos=params.ignore_eos,
            top_logprobs=scored,
            prompt_logprobs=self._echo and self._logprobs is not None,
            owner=owner,
            constraint=None if params.form is None else params.form.constrain(),
        )

    def _body(self, choice: Choice, prompt: int, *, echo: bool | None = None) -> Body:
        echo = self._echo if echo is None else echo
        text = self._prompts[prompt][0] + choice.text if echo else choice.text
        logprobs = None if self._logprobs is None else self._logprobs_body(choice, echo)
        body = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        return body if self.verification is None else body | {"reward": self.verification.reward(choice)}

    def _logprobs_body(self, choice: Choice, echo: bool) -> Body:
        model = self._model
        found: list[tuple[int, Logprobs | None]] = list(zip(choice.tokens, choice.logprobs, strict=True))
        sequence = self.answers.sequences[choice.index]
        if echo:
            found = [*zip(sequence.request.prompt_ids, [None, *sequence.prompt_logprobs], strict=True), *found]
        offsets, at = [], self._offsets.get(choice.index, 0)
        for token, _ in found:
            offsets.append(at)
            at += len(model.tokenizer.token_bytes(token).decode("utf-8", "ignore"))
        self._offsets[choice.index] = at
        return {
            "tokens": [model.token_text(token) for token, _ in found],
            "token_logprobs": [None if item is None else item.logprob for _, item in found],
            "top_logprobs": [
                None if item is None else {model.token_text(token): value for token, value in item.top}
                for _, item in found
            ],
            "text_offset": offsets,
        }


def _read_prompts(fields: Fields, model: ServedModel, *, with_text: bool) -> list[tuple[str, list[int]]]:
    """Each prompt's text and ids: `prompt` is a text, ids, or a list of either; ids get theirs `with_text` alone."""
    value = fields.get("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and all(_is_id(item) for item in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise invalid("prompt", f"got {show(value)}, expected a string, token ids, or a list of either")
    special = fields.flag("add_special_tokens", True)
    prompts = []
    for number, item in enumerate(value):
        where = "prompt" if len(value) == 1 else f"prompt[{number}]"
        if isinstance(item, str):
            try:
                prompts.append((item, model.encode(item, add_special_tokens=special)))
            except ConfigError as error:
                raise invalid(where, str(error)) from error
        elif isinstance(item, list) and item and all(_is_id(token) for token in item):
            if wrong := [token for token in item if not 0 <= token < model.bundle.model.vocab_size]:
                raise invalid(where, f"got token {wrong[0]}, expected ids below {model.bundle.model.vocab_size}")
            prompts.append((model.tokenizer.decode(item) if with_text else "", item))
        else:
            raise invalid(where, f"got {show(item)}, expected a string or a list of token ids")
    return prompts


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
