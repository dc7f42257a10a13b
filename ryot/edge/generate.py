"""Text from a bundle: streaming, stop strings, batches, and the check against a bundle's golden prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ryot.errors import BundleError, ConfigError, ContextError

if TYPE_CHECKING:
    from ryot.edge.bundle import Bundle
    from ryot.edge.engine import Engine
    from ryot.edge.sampling import Sampler
    from ryot.edge.sampling_params import SamplingParams
    from ryot.edge.tokenizer import Tokenizer

#: What is continued: a text, or token ids, such as those of a chat's template.
Prompt = str | Sequence[int]
#: `stop`: a stop string came; `eos`: the model ended the text; `length`: as many tokens as asked for, or as fit.
FinishReason = Literal["stop", "eos", "length"]


@dataclass(slots=True)
class Completion:
    """What one prompt led to."""

    prompt_ids: list[int]
    tokens: list[int] = field(default_factory=list)
    """Generated ids, an end-of-text id included."""
    text: str = ""
    """Their text, up to a stop string, without an unfinished last character."""
    finish_reason: FinishReason | None = None
    first_token_s: float = 0.0
    """From the beginning of the work to the first token; a stream's alone."""
    whole_s: float = 0.0
    """And to the last one."""


class StopFilter:
    """Passes text on except for what is, or may yet become, a stop string."""

    def __init__(self, stop: Sequence[str]):
        if any(not s for s in stop):
            raise ConfigError("stop: got an empty string, expected at least one character")
        self._stop = tuple(stop)
        self._held = ""
        #: Whether a stop string came; nothing passes after it.
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of all text so far that can no longer belong to a stop string and has not passed yet."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            passed, self._held = self._held[: min(found)], ""
            return passed
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(passed) :]
        return passed

    def flush(self) -> str:
        """What was held back, for no more text comes."""
        rest, self._held = self._held, ""
        return rest


class TextRow:
    """One sequence on its way: turns its tokens into text and knows when it is done."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        num_tokens: int,
        eos: Sequence[int],
        stop: Sequence[str],
        *,
        continues: bool,
    ):
        self.completion = Completion(prompt_ids)
        self._num_tokens = num_tokens
        self._eos = eos
        # A text goes on with its prompt; after token ids, such as a chat's, a new one begins.
        self._stream = tokenizer.stream(after=prompt_ids if continues else ())
        self._filter = StopFilter(stop)

    @property
    def done(self) -> bool:
        return self.completion.finish_reason is not None

    def push(self, token: int) -> str:
        """Take a token; returns the text that it completes."""
        completion = self.completion
        completion.tokens.append(token)
        text = ""
        if token in self._eos:
            completion.finish_reason = "eos"
        else:
            text = self._filter.push(self._stream.push(token))
            if self._filter.stopped:
                completion.finish_reason = "stop"
            elif len(completion.tokens) >= self._num_tokens:
                completion.finish_reason = "length"
        if completion.finish_reason in ("eos", "length"):
            text += self._filter.flush()
        completion.text += text
        return text


class Generation:
    """An iterator over the pieces of one prompt's text as they are generated; `completion` holds the whole."""

    def __init__(self, pieces: Iterator[str], completion: Completion):
        self._pieces = pieces
        self.completion = completion

    def __iter__(self) -> Iterator[str]:
        return self._pieces


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Generation:
    """Stream the continuation of `prompt`, greedy unless `sampling` says otherwise.

    A text prompt gets what the checkpoint puts around a text, mostly bos before it; token ids are taken as they are.
    At most `max_new_tokens` tokens, by default as many as the context has room for. Raises `ContextError` before any
    work when prompt and tokens together do not fit, `ConfigError` for a number below 1.
    """
    assert engine.batch_size == 1
    ids, num_tokens = _plan(engine, tokenizer, [prompt], max_new_tokens)
    eos = () if ignore_eos else engine.bundle.eos_token_ids
    row = TextRow(tokenizer, ids[0], num_tokens, eos, stop, continues=isinstance(prompt, str))
    sampler = _build_samplers(sampling, ids)

    def pieces() -> Iterator[str]:
        begin = time.perf_counter()
        engine.prefill(ids)
        while True:
            token = _next_token(engine, sampler, 0)
            if not row.completion.tokens:
                row.completion.first_token_s = time.perf_counter() - begin
            if text := row.push(token):
                yield text
            if row.done:
                row.completion.whole_s = time.perf_counter() - begin
                return
            engine.step()

    return Generation(pieces(), row.completion)


def generate_batch(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> list[Completion]:
    """Continue `engine.batch_size` prompts together; each row ends by itself. Raises like `generate`."""
    assert len(prompts) == engine.batch_size
    ids, num_tokens = _plan(engine, tokenizer, prompts, max_new_tokens)
    eos = () if ignore_eos else engine.bundle.eos_token_ids
    rows = [
        TextRow(tokenizer, row_ids, num_tokens, eos, stop, continues=isinstance(prompt, str))
        for prompt, row_ids in zip(prompts, ids, strict=True)
    ]
    engine.prefill(ids)
    return _complete(engine, rows, _build_samplers(sampling, ids))


def _complete(engine: Engine, rows: list[TextRow], samplers: list[Sampler] | None) -> list[Completion]:
    """Step all rows until each is done; what a row gives after its end is not looked at."""
    while True:
        for index, row in enumerate(rows):
            if not row.done:
                row.push(_next_token(engine, samplers, index))
        if all(row.done for row in rows):
            return [row.completion for row in rows]
        engine.step()


def golden_rows(bundle: Bundle) -> int:
    """Golden prompts that are answered together: all, since a step reads every weight whatever the rows.

    One by one for `int8-dyn`: graphs of before take one scale for all tokens of a call, a pair's prefill too, so that
    rows would change each other's logits.
    """
    return 1 if "int8-dyn" in bundle.precision else max(1, len(bundle.golden))


def check_golden(engine: Engine) -> int:
    """Compare the bundle's golden prompts with what `engine` answers; returns how many tokens were compared.

    Tokens must be equal up to the first position where the reference's margin between its two best logits is below
    the bundle's tolerance: from there on another CPU's rounding may rightly choose the other. Raises `BundleError`
    at the first difference before that.
    """
    bundle, rows = engine.bundle, engine.batch_size
    compared = 0
    for first in range(0, len(bundle.golden), rows):
        compared += _compare_golden(engine, range(first, min(first + rows, len(bundle.golden))))
    if bundle.golden and not compared:
        raise BundleError(f"bundle {bundle.path}: no golden token has a margin above {bundle.tolerance:.3g}")
    return compared


def _compare_golden(engine: Engine, numbers: Sequence[int]) -> int:
    """Compare some golden prompts, at most one per row; rows that are left over answer the last one again."""
    bundle = engine.bundle
    golden = [bundle.golden[number] for number in numbers]
    golden += golden[-1:] * (engine.batch_size - len(golden))
    ends = [next((i for i, m in enumerate(g.margins) if m < bundle.tolerance), len(g.tokens)) for g in golden]
    engine.prefill([g.ids for g in golden])
    for position in range(max(ends)):
        if position:
            engine.step()
        for row, number in enumerate(numbers):
            if position >= ends[row]:
                continue
            token, expected = int(engine.next_token[row]), golden[row].tokens[position]
            if token != expected:
                raise BundleError(
                    f"bundle {bundle.path}: golden prompt {number + 1}: token {position + 1} is {token}, expected "
                    f"{expected} (margin {golden[row].margins[position]:.3g}, tolerance {bundle.tolerance:.3g})",
                    hint="this CPU or onnxruntime computes something else than the bundle was checked with",
                )
    return sum(ends[: len(numbers)])


def encode_prompt(bundle: Bundle, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids of a prompt; an empty text is the id that begins a text. Raises `ConfigError` where there is none."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if ids:
        return ids
    if bundle.bos_token_id is None:
        raise ConfigError("prompt: is empty, and this model has no token that begins a text; give at least a character")
    return [bundle.bos_token_id]


def _plan(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens: int | None
) -> tuple[list[list[int]], int]:
    """The ids of each prompt and how many tokens to generate."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: got {max_new_tokens}, expected a whole number above 0")
    ids = [encode_prompt(engine.bundle, tokenizer, prompt) for prompt in prompts]
    longest = max(len(row) for row in ids)
    room = engine.max_len - longest
    if room < 1 or (max_new_tokens or 1) > room:
        wanted = "" if max_new_tokens is None else f" and {max_new_tokens} new ones"
        raise ContextError(
            f"a prompt of {longest} tokens{wanted} does not fit the context of {engine.max_len} tokens",
            hint=f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt",
        )
    return ids, max_new_tokens or room


def _build_samplers(sampling: SamplingParams | None, ids: list[list[int]]) -> list[Sampler] | None:
    """One sampler a row; None when the runtime's own greedy choice serves."""
    if sampling is None or sampling.greedy:
        return None
    from ryot.edge.sampling import Sampler  # not needed, and not loaded, for greedy text

    return [Sampler(sampling, row_ids, row=row) for row, row_ids in enumerate(ids)]


def _next_token(engine: Engine, samplers: list[Sampler] | None, row: int) -> int:
    if samplers is not None:
        engine.next_token[row] = samplers[row].choose(engine.logits[row])
    return int(engine.next_token[row])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
