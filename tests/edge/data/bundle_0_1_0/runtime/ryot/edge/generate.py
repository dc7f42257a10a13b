"""Text from a bundle: streaming, stop strings, batches, and the check against a bundle's golden prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ryot.edge.tokenizer import TextStream, Tokenizer
from ryot.errors import BundleError, ConfigError, ContextError

if TYPE_CHECKING:
    from ryot.edge.engine import Engine
    from ryot.edge.sampling import Sampler
    from ryot.edge.sampling_params import SamplingParams

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


class _Row:
    """One sequence on its way: turns its tokens into text and knows when it is done."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: list[int], num_tokens: int, eos: Sequence[int], stop: Sequence[str]
    ):
        self.completion = Completion(prompt_ids)
        self._num_tokens = num_tokens
        self._eos = eos
        self._stream = TextStream(tokenizer)
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
    decoder: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Generation:
    """Stream the continuation of `prompt`, greedy unless `sampling` says otherwise.

    At most `max_new_tokens` tokens, by default as many as the context has room for. Raises `ContextError` before any
    work when prompt and tokens together do not fit, `ConfigError` for a number below 1.
    """
    assert decoder.batch_size == 1
    ids, num_tokens = _plan(decoder, tokenizer, [prompt], max_new_tokens)
    eos = () if ignore_eos else decoder.bundle.eos_token_ids
    row = _Row(tokenizer, ids[0], num_tokens, eos, stop)
    sampler = _build_samplers(sampling, ids)

    def pieces() -> Iterator[str]:
        decoder.prefill(ids)
        while True:
            if text := row.push(_next_token(decoder, sampler, 0)):
                yield text
            if row.done:
                return
            decoder.step()

    return Generation(pieces(), row.completion)


def generate_batch(
    decoder: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> list[Completion]:
    """Continue `decoder.batch_size` prompts together; each row ends by itself. Raises like `generate`."""
    assert len(prompts) == decoder.batch_size
    ids, num_tokens = _plan(decoder, tokenizer, prompts, max_new_tokens)
    eos = () if ignore_eos else decoder.bundle.eos_token_ids
    rows = [_Row(tokenizer, row_ids, num_tokens, eos, stop) for row_ids in ids]
    decoder.prefill(ids)
    return _complete(decoder, rows, _build_samplers(sampling, ids))


def generate_candidates(
    decoder: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    sampling: SamplingParams,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> list[Completion]:
    """`decoder.batch_size` continuations of one prompt, which is computed once; each row draws by itself.

    Raises like `generate`, and `ConfigError` when the sampling would make all of them the same.
    """
    if sampling.temperature == 0 and decoder.batch_size > 1:
        raise ConfigError("temperature: got 0, which makes all candidates the same, expected a number above 0")
    ids, num_tokens = _plan(decoder, tokenizer, [prompt], max_new_tokens)
    eos = () if ignore_eos else decoder.bundle.eos_token_ids
    rows = [_Row(tokenizer, ids[0], num_tokens, eos, stop) for _ in range(decoder.batch_size)]
    decoder.prefill_shared(ids[0])
    return _complete(decoder, rows, _build_samplers(sampling, ids * decoder.batch_size))


def _complete(decoder: Engine, rows: list[_Row], samplers: list[Sampler] | None) -> list[Completion]:
    """Step all rows until each is done; what a row gives after its end is not looked at."""
    while True:
        for index, row in enumerate(rows):
            if not row.done:
                row.push(_next_token(decoder, samplers, index))
        if all(row.done for row in rows):
            return [row.completion for row in rows]
        decoder.step()


def check_golden(decoder: Engine) -> int:
    """Compare the bundle's golden prompts with what `decoder` answers; returns how many tokens were compared.

    Tokens must be equal up to the first position where the reference's margin between its two best logits is below
    the bundle's tolerance: from there on another CPU's rounding may rightly choose the other. Raises `BundleError`
    at the first difference before that.
    """
    bundle = decoder.bundle
    assert decoder.batch_size == 1
    compared = 0
    for number, golden in enumerate(bundle.golden, start=1):
        decoder.prefill([golden.ids])
        for position, (expected, margin) in enumerate(zip(golden.tokens, golden.margins, strict=True)):
            if margin < bundle.tolerance:
                break
            if position:
                decoder.step()
            token = int(decoder.next_token[0])
            if token != expected:
                raise BundleError(
                    f"bundle {bundle.path}: golden prompt {number}: token {position + 1} is {token}, "
                    f"expected {expected} (margin {margin:.3g}, tolerance {bundle.tolerance:.3g})",
                    hint="this CPU or onnxruntime computes something else than the bundle was checked with",
                )
            compared += 1
    if bundle.golden and not compared:
        raise BundleError(f"bundle {bundle.path}: no golden token has a margin above {bundle.tolerance:.3g}")
    return compared


def _plan(
    decoder: Engine, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int | None
) -> tuple[list[list[int]], int]:
    """The ids of each prompt (an empty one begins a text) and how many tokens to generate."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: got {max_new_tokens}, expected a whole number above 0")
    ids = [tokenizer.encode(prompt) or [decoder.bundle.bos_token_id] for prompt in prompts]
    longest = max(len(row) for row in ids)
    room = decoder.max_len - longest
    if room < 1 or (max_new_tokens or 1) > room:
        wanted = "" if max_new_tokens is None else f" and {max_new_tokens} new ones"
        raise ContextError(
            f"a prompt of {longest} tokens{wanted} does not fit the context of {decoder.max_len} tokens",
            hint=f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt",
        )
    return ids, max_new_tokens or room


def _build_samplers(sampling: SamplingParams | None, ids: list[list[int]]) -> list[Sampler] | None:
    """One sampler a row; None when the runtime's own greedy choice serves."""
    if sampling is None or sampling.greedy:
        return None
    from ryot.edge.sampling import Sampler  # not needed, and not loaded, for greedy text

    return [Sampler(sampling, row_ids, row=row) for row, row_ids in enumerate(ids)]


def _next_token(decoder: Engine, samplers: list[Sampler] | None, row: int) -> int:
    if samplers is not None:
        decoder.next_token[row] = samplers[row].choose(decoder.logits[row])
    return int(decoder.next_token[row])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
