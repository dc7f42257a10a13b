"""The fields that text and chat completions share, read and checked."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ryot.edge.sampling_params import SamplingParams
from ryot.edge.verifiers import Verifier
from ryot.errors import ConfigError
from ryot.serve.constraints import Form
from ryot.serve.errors import invalid
from ryot.serve.fields import Fields, show
from ryot.serve.model import ServedModel
from ryot.serve.verified import Verification, read_verifier

MAX_CHOICES = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_LOGPROBS = 20
SMALLEST_TOP_P = 1e-9
#: Understood without effect: they say who asks, or what only OpenAI's own service can do.
IGNORED = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "prompt_cache_key",
    "safety_identifier",
    "parallel_tool_calls",
    "prompt_cache_retention",
)
SHARED = (
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stream",
    "stream_options",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "response_format",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "structured_outputs",
    "logprobs",
    "best_of",
    "verifier",
    *IGNORED,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """How answers are made, and how they are sent."""

    sampling: SamplingParams
    max_tokens: int | None
    """None is as many as fit."""
    max_tokens_name: str | None
    """The field that gave it, where the request has one."""
    n: int
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    form: Form | None
    """Of each answer; None lets any text pass."""
    verifier: Verifier | None
    num_candidates: int
    """`best_of`, at least `n`: of so many the `n` best are answered."""

    def too_long(self, prompt: str, size: int, max_len: int) -> str:
        """The field to blame where a prompt of `size` tokens, in the field `prompt`, and its answer do not fit."""
        return prompt if self.max_tokens_name is None or size >= max_len else self.max_tokens_name

    def verify(self, prompts: Sequence[str]) -> Verification | None:
        """The verification of the answers to `prompts`, where one is asked for."""
        if self.verifier is None:
            return None
        return Verification(self.verifier, prompts, self.num_candidates, self.n)


def read_params(
    fields: Fields, model: ServedModel, *, max_tokens_names: Sequence[str], default_max: int | None
) -> Params:
    """The shared fields. Raises `ApiError`."""
    stream = fields.flag("stream")
    options = fields.table("stream_options")
    if options is not None:
        options.refuse_unknown(("include_usage", "include_obfuscation"))
        if not stream:
            raise invalid("stream_options", "is only for a request with stream: true")
    given = {name: value for name in max_tokens_names if (value := fields.integer(name, None, 0)) is not None}
    n = fields.integer("n", 1, 1, MAX_CHOICES) or 1
    verifier = read_verifier(fields, model.rights)
    max_tokens_name = next(iter(given), None)
    stop, form = _read_stop(fields), _read_form(fields, model)
    if stop and form is not None:
        # An answer that ends with `stop` has its form, which a string in the middle of it would cut off.
        raise invalid("stop", f"got {show(fields.get('stop'))}, expected none beside a form, which says where it ends")
    return Params(
        sampling=_read_sampling(fields, model),
        max_tokens=default_max if max_tokens_name is None else given[max_tokens_name],
        max_tokens_name=max_tokens_name,
        n=n,
        stop=stop,
        ignore_eos=fields.flag("ignore_eos"),
        stream=stream,
        include_usage=options is not None and options.flag("include_usage"),
        form=form,
        verifier=verifier,
        num_candidates=_read_best_of(fields, n, stream, verifier),
    )


def _read_best_of(fields: Fields, n: int, stream: bool, verifier: Verifier | None) -> int:
    best_of = fields.integer("best_of", None, 1, MAX_CHOICES)
    if best_of is not None and best_of < n:
        raise invalid("best_of", f"got {best_of}, expected at least n, which is {n}")
    if stream and verifier is not None:
        raise invalid("verifier", "cannot be streamed: which is best is known at the end")
    if stream and best_of is not None and best_of > n:
        raise invalid("best_of", "cannot be streamed: which is best is known at the end")
    return best_of or n


def _read_sampling(fields: Fields, model: ServedModel) -> SamplingParams:
    preset = model.generation_config
    # Two draws by one seed are equal; without a seed none is.
    seed = fields.integer("seed", None, -(2**63), 2**64)
    try:
        return SamplingParams(
            temperature=fields.number("temperature", _preset(preset, "temperature", 1.0), 0, 2),
            # 0 is allowed by OpenAI and means the best token, which every p above 0 keeps.
            top_p=max(fields.number("top_p", _preset(preset, "top_p", 1.0), 0, 1), SMALLEST_TOP_P),
            top_k=max(fields.integer("top_k", int(_preset(preset, "top_k", 0)), -1, 2**31) or 0, 0),
            min_p=fields.number("min_p", _preset(preset, "min_p", 0.0), 0, 1),
            repetition_penalty=fields.number("repetition_penalty", _preset(preset, "repetition_penalty", 1.0), 0, 100),
            presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
            logit_bias=_read_bias(fields, model),
            seed=secrets.randbits(63) if seed is None else seed % 2**64,
        )
    except ConfigError as error:
        name, _, message = str(error).partition(": ")
        raise invalid(name, message) from error


def _preset(values: Mapping[str, object], name: str, default: float) -> float:
    """What the checkpoint's authors recommend, where they do."""
    value = values.get(name)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else default  # type: ignore[arg-type]


def _read_bias(fields: Fields, model: ServedModel) -> tuple[tuple[int, float], ...]:
    table = fields.table("logit_bias")
    if table is None:
        return ()
    values = fields.get("logit_bias")
    assert isinstance(values, dict)
    biases = []
    for key in values:
        if not (key.isascii() and key.isdigit() and int(key[:9]) < model.bundle.model.vocab_size and len(key) < 10):
            raise invalid(
                "logit_bias", f"got the key {show(key)}, expected a token id below {model.bundle.model.vocab_size}"
            )
        biases.append((int(key), table.number(key, 0.0, -100, 100)))
    return tuple(biases)


def _read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else fields.items("stop")
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"got {len(stops)} strings, expected at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise invalid("stop", f"got {show(stop)}, expected strings of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(str(stop) for stop in stops)


def _read_form(fields: Fields, model: ServedModel) -> Form | None:
    """The form that `response_format`, as OpenAI has it, or `structured_outputs`, as vLLM has it, asks for."""
    wanted, own = fields.table("response_format"), fields.table("structured_outputs")
    where = "response_format" if wanted is not None else "structured_outputs"
    try:
        if wanted is not None:
            return _read_response_format(wanted, model)
        return None if own is None else _read_structured_outputs(own, model)
    except ConfigError as error:
        raise invalid(where, str(error)) from error


def _read_response_format(wanted: Fields, model: ServedModel) -> Form | None:
    match wanted.choice("type", ("text", "json_object", "json_schema", "regex", "grammar")):
        case "regex" | "grammar" as kind:
            text = wanted.text(kind) or wanted.text("pattern" if kind == "regex" else "value")
            if not text:
                raise invalid(wanted.where(kind), "is missing, expected a string")
            return model.grammars.build_regex(text) if kind == "regex" else model.grammars.build_grammar(text)
        case "json_object":
            return model.grammars.build_json({"type": "object"})
        case "json_schema":
            described = wanted.table("json_schema")
            schema = None if described is None else described.get("schema")
            if not isinstance(schema, dict):
                raise invalid(wanted.where("json_schema.schema"), f"got {show(schema)}, expected an object")
            return model.grammars.build_json(schema)
        case "text":
            return None
    raise invalid(wanted.where("type"), "is missing, expected text, json_object, json_schema, regex or grammar")


def _read_structured_outputs(own: Fields, model: ServedModel) -> Form:
    own.refuse_unknown(("json", "regex", "grammar", "choice"))
    if isinstance(schema := own.get("json"), dict):
        return model.grammars.build_json(schema)
    if (pattern := own.text("regex")) is not None:
        return model.grammars.build_regex(pattern)
    if (grammar := own.text("grammar")) is not None:
        return model.grammars.build_grammar(grammar)
    choices = own.items("choice")
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise invalid("structured_outputs", "expected one of json, regex, grammar or choice, a list of strings")
    return model.grammars.build_choice([str(choice) for choice in choices])
