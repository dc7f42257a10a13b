"""`/v1/chat/completions`: conversations, as the checkpoint's template writes them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence

from ryot.edge.sequence import Request
from ryot.errors import ConfigError, RyotError
from ryot.serve.answers import Body, Choice, count_usage, describe_token
from ryot.serve.constraints import Form
from ryot.serve.errors import ApiError, api_error, invalid
from ryot.serve.fields import Fields, show
from ryot.serve.model import ServedModel
from ryot.serve.params import MAX_LOGPROBS, SHARED, read_params
from ryot.serve.runner import Answers
from ryot.serve.tools import Tools, read_tools

FIELDS = (
    *SHARED,
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "tool_choice",
    "modalities",
    "reasoning_effort",
    "verbosity",
    "chat_template_kwargs",
)
ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatCompletion:
    """One request for the next message of a conversation."""

    answers: Answers

    def __init__(self, fields: Fields, model: ServedModel, owner: str):
        """Read the request, from any thread. Raises `ApiError`."""
        fields.refuse_unknown(FIELDS)
        if any(kind != "text" for kind in fields.items("modalities")):
            raise invalid("modalities", f"got {show(fields.get('modalities'))}, expected text alone")
        self._model = model
        self._tools = read_tools(fields, model)
        self.has_plain_chunks = self._tools is None
        #: Of a stream with tools: the text of each choice, and how much of it was sent.
        self._texts: dict[int, str] = {}
        self._sent: dict[int, int] = {}
        self._params = params = read_params(
            fields, model, max_tokens_names=("max_completion_tokens", "max_tokens"), default_max=None
        )
        self._top_logprobs = _read_logprobs(fields)
        ids = encode_messages(fields, model, self._tools)
        form = self._read_call_form(params.form)
        room = model.engine.max_len - len(ids)
        if room < 1:
            raise ApiError(
                400,
                f"messages: have {len(ids)} tokens, template included; this model's context has "
                f"{model.engine.max_len}, of which the answer needs at least one",
                param="messages",
                code="context_length_exceeded",
            )
        self.num_per_prompt = params.num_candidates
        self.verification = params.verify([""])
        if self.verification is None and params.num_candidates > params.n:
            raise invalid("best_of", "is only for a request with a verifier")
        self.include_usage = params.include_usage
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        # Of equal rewards the likeliest answer is the best one.
        scored = 0 if self._top_logprobs is None and params.n < params.num_candidates else self._top_logprobs
        requests = [
            Request(
                prompt_ids=ids,
                max_tokens=room if params.max_tokens is None else params.max_tokens,
                sampling=params.sampling,
                choice=choice,
                stop=params.stop,
                ignore_eos=params.ignore_eos,
                continues_text=False,
                top_logprobs=scored,
                owner=owner,
                constraint=None if form is None else form.constrain(),
            )
            for choice in range(params.num_candidates)
        ]
        try:
            self._sequences = model.runner.build(requests)
        except RyotError as error:
            # There is room for a token at least, or `room` had said so.
            raise api_error(error, params.max_tokens_name or "messages") from error

    def submit(self) -> None:
        self.answers = self._model.runner.submit(self._sequences, n=self._params.n)

    @property
    def stream(self) -> bool:
        """Whether the answer is sent as it grows."""
        return self._params.stream

    def whole(self, choices: Sequence[Choice]) -> Body:
        verification = self.verification
        kept = choices if verification is None else verification.best(choices, self._params.n)
        bodies: list[Body] = []
        for index, choice in enumerate(kept):
            message, called = self._message(choice.text)
            bodies.append(
                {
                    "index": index,
                    "message": {"role": "assistant", **message, "refusal": None},
                    "logprobs": self._logprobs_body(choice),
                    "finish_reason": "tool_calls" if called else choice.finish_reason,
                }
            )
        usage = count_usage(self.answers, self.num_per_prompt)
        answer = self._head("chat.completion") | {"choices": bodies, "usage": usage}
        if verification is None:
            return answer
        for body, choice in zip(bodies, kept, strict=True):
            body["reward"] = verification.reward(choice)
        return answer | {"verification": verification.body(choices)}

    def first_chunks(self) -> Iterable[Body]:
        for index in range(self._params.n):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._head("chat.completion.chunk") | {"choices": [choice]}

    def chunk(self, piece: Choice) -> Body:
        delta: Body = {"content": piece.text} if piece.text or piece.logprobs else {}
        finish_reason = piece.finish_reason
        if self._tools is not None:
            delta, called = self._delta(piece)
            finish_reason = "tool_calls" if called else finish_reason
        choice = {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs_body(piece),
            "finish_reason": finish_reason,
        }
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def last_chunks(self) -> Iterable[Body]:
        if self.include_usage:
            usage = count_usage(self.answers, self.num_per_prompt)
            yield self._head("chat.completion.chunk") | {"choices": [], "usage": usage}

    def _read_call_form(self, form: Form | None) -> Form | None:
        """The form of the answer: that of a call where one is required, else what was asked for."""
        if self._tools is None or not self._tools.required:
            return form
        if form is not None:
            raise invalid("response_format", "and a tool_choice that requires a call exclude each other")
        try:
            return self._tools.form(self._model)
        except ConfigError as error:
            raise invalid("tools", str(error)) from error

    def _delta(self, piece: Choice) -> tuple[Body, bool]:
        """What a piece adds where there are tools: text that can be no call, and at the end the calls or the rest."""
        assert self._tools is not None
        text = self._texts[piece.index] = self._texts.get(piece.index, "") + piece.text
        sent = self._sent.get(piece.index, 0)
        if piece.finish_reason is None:
            certain = self._sent[piece.index] = max(sent, self._tools.certain_text(text))
            return ({"content": text[sent:certain]} if certain > sent else {}), False
        _, calls = self._tools.read(text)
        if calls:
            return {"tool_calls": [call.body(index) for index, call in enumerate(calls)]}, True
        return ({"content": text[sent:]} if text[sent:] else {}), False

    def _message(self, text: str) -> tuple[Body, bool]:
        """Content and calls of an answer, and whether there are any calls."""
        said, calls = (text, []) if self._tools is None else self._tools.read(text)
        if not calls:
            return {"content": said}, False
        return {"content": said or None, "tool_calls": [call.body() for call in calls]}, True

    def _head(self, kind: str) -> Body:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _logprobs_body(self, choice: Choice) -> Body | None:
        if self._top_logprobs is None:
            return None
        content = []
        for token, item in zip(choice.tokens, choice.logprobs, strict=True):
            top = [describe_token(self._model, other, value) for other, value in item.top]
            content.append(describe_token(self._model, token, item.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}


def encode_messages(fields: Fields, model: ServedModel, tools: Tools | None = None) -> list[int]:
    """The ids of the request's conversation, up to where the answer begins. Raises `ApiError`."""
    if model.template is None:
        raise invalid("messages", f"the model {model.name} has no chat template; use /v1/completions")
    kwargs = fields.table("chat_template_kwargs")
    extra = {} if kwargs is None else fields.get("chat_template_kwargs")
    assert isinstance(extra, dict)
    if taken := {"self", "messages", "add_generation_prompt", "tools"} & extra.keys():
        raise invalid("chat_template_kwargs", f"{min(taken)} is set by the server")
    if (count := len(fields.items("messages"))) > model.engine.max_len:
        # Each has a token at least, and what templates do with each may grow with all before it.
        raise ApiError(
            400,
            f"messages: got {count}, more than the {model.engine.max_len} tokens of this model's context",
            param="messages",
            code="context_length_exceeded",
        )
    try:
        messages = _read_messages(fields)
        if tools is not None:
            assert model.tool_template is not None, "read_tools has looked"
            text = model.tool_template.render(messages, tools=tools.described, **extra)
        else:
            text = model.template.render(messages, **extra)
        return model.encode(text, add_special_tokens=False)
    except ConfigError as error:
        raise invalid("messages", str(error).removeprefix(f"{model.bundle.path}: ")) from error


def _read_messages(fields: Fields) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    for number, value in enumerate(fields.items("messages")):
        where = f"messages[{number}]"
        if not isinstance(value, dict):
            raise invalid(where, f"got {show(value)}, expected an object")
        message = Fields(value, f"{where}.")
        role = message.choice("role", ROLES)
        if role is None:
            raise invalid(f"{where}.role", f"is missing, expected one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_read_part(part, f"{where}.content[{at}]") for at, part in enumerate(content))
        if content is None and role == "assistant":
            content = ""
        if not isinstance(content, str):
            raise invalid(f"{where}.content", f"got {show(content)}, expected a string or a list of text parts")
        if role == "assistant" and message.get("tool_calls") is not None:
            value = value | {"tool_calls": _read_calls(message, where)}
        # What OpenAI calls developer is what templates know as system.
        messages.append(value | {"role": "system" if role == "developer" else role, "content": content})
    if not messages:
        raise invalid("messages", "is empty or missing, expected a list of messages")
    return messages


def _read_calls(message: Fields, where: str) -> list[object]:
    """Earlier calls, with their arguments as an object: templates write them as JSON themselves."""
    calls: list[object] = []
    for number, value in enumerate(message.items("tool_calls")):
        place = f"{where}.tool_calls[{number}]"
        function = value.get("function") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(place, f"got {show(value)}, expected a call of a function with a name")
        arguments = function.get("arguments", "{}")
        try:
            read = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError) as error:
            raise invalid(f"{place}.function.arguments", f"got {show(arguments)}, expected JSON") from error
        calls.append(value | {"function": function | {"arguments": read}})
    return calls


def _read_part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise invalid(where, f"got {show(part)}, expected a part of type text: the models here read nothing else")
    return str(part["text"])


def _read_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", None, 0, MAX_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top is not None:
        raise invalid("top_logprobs", "is only for a request with logprobs: true")
    return None
