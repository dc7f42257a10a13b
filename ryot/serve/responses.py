"""`/v1/responses`: OpenAI's newer way to ask for the next message, over the same chat; nothing is kept between two."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Sequence

from ryot.serve.answers import Body, Choice, count_usage
from ryot.serve.chat import ChatCompletion
from ryot.serve.errors import ApiError, invalid
from ryot.serve.fields import Fields, show
from ryot.serve.model import ServedModel
from ryot.serve.runner import Answers
from ryot.serve.verified import Verification

#: Passed on to the chat as they are.
SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "user", "metadata", "safety_identifier")
#: Beside OpenAI's: what the chat understands too.
OWN = ("seed", "top_k", "min_p", "repetition_penalty", "ignore_eos", "stop", "chat_template_kwargs")
FIELDS = (
    *SAME,
    *OWN,
    "input",
    "instructions",
    "max_output_tokens",
    "text",
    "tools",
    "tool_choice",
    "store",
    "include",
    "truncation",
    "previous_response_id",
)
#: What the chat calls fields that have another name here.
CHAT_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
PARTS = ("input_text", "output_text", "text")


class ResponseAnswer:
    """One request, answered by a chat."""

    num_per_prompt = 1
    include_usage = False
    has_plain_chunks = False
    verification: Verification | None = None
    answers: Answers

    def __init__(self, fields: Fields, model: ServedModel, owner: str):
        """Read the request, from any thread. Raises `ApiError`."""
        fields.refuse_unknown(FIELDS)
        if fields.text("previous_response_id"):
            raise invalid("previous_response_id", "is not supported: nothing is kept; send the whole conversation")
        chat = {name: fields.get(name) for name in (*SAME, *OWN) if fields.get(name) is not None}
        chat["messages"] = _read_input(fields)
        if (limit := fields.integer("max_output_tokens", None, 1)) is not None:
            chat["max_completion_tokens"] = limit
        if (form := _read_format(fields)) is not None:
            chat["response_format"] = form
        if tools := fields.items("tools"):
            chat["tools"] = [_read_tool(tool) for tool in tools]
        choice = fields.get("tool_choice")
        if isinstance(choice, dict) and "name" in choice:
            choice = {"type": "function", "function": {"name": choice["name"]}}
        if choice is not None:
            chat["tool_choice"] = choice
        self._told = fields.get("instructions") is not None
        try:
            self._chat = ChatCompletion(Fields(chat), model, owner)
        except ApiError as error:
            raise self._renamed(error) from error
        self._asked: Body = {
            "instructions": fields.get("instructions"),
            "max_output_tokens": limit,
            "metadata": fields.get("metadata") or {},
            "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
            "temperature": fields.get("temperature"),
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": tools,
            "top_p": fields.get("top_p"),
        }
        self._streams_text = not tools
        self._head: Body = {"id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time())}
        self._head["model"] = model.name
        self._message_id = f"msg_{secrets.token_hex(12)}"
        self._sent = Choice(0)
        self._number = 0

    def submit(self) -> None:
        self._chat.submit()
        self.answers = self._chat.answers

    @property
    def stream(self) -> bool:
        """Whether the answer is sent as it grows."""
        return self._chat.stream

    def whole(self, choices: Sequence[Choice]) -> Body:
        (choice,) = choices
        cut = choice.finish_reason == "length"
        usage = count_usage(self.answers, 1)
        return self._body("incomplete" if cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items(choice),
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    def first_chunks(self) -> Iterable[Body]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._body("in_progress"))
        if self._streams_text:
            yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
            yield self._event("response.content_part.added", **self._place, part=_text_part(""))

    def chunk(self, piece: Choice) -> Body:
        self._sent.text += piece.text
        self._sent.finish_reason = piece.finish_reason
        if not self._streams_text:
            return self._event("response.in_progress", response=self._body("in_progress"))
        return self._event("response.output_text.delta", **self._place, delta=piece.text, logprobs=[])

    def last_chunks(self) -> Iterable[Body]:
        whole = self.whole([self._sent])
        for index, item in enumerate(whole["output"]):
            if self._streams_text:
                text = self._sent.text
                yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
                yield self._event("response.content_part.done", **self._place, part=_text_part(text))
            else:
                yield self._event("response.output_item.added", output_index=index, item=item)
            yield self._event("response.output_item.done", output_index=index, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _renamed(self, error: ApiError) -> ApiError:
        """An error of the chat, of the field that this request has in its place."""
        param = error.param or ""
        if found := re.match(r"messages\[(\d+)\]", param):
            number = int(found[1]) - self._told
            return error.about("instructions" if number < 0 else f"input[{number}]{param[found.end() :]}")
        name, dot, rest = param.partition(".")
        return error.about(f"{CHAT_NAMES[name]}{dot}{rest}") if name in CHAT_NAMES else error

    @property
    def _place(self) -> Body:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **values: object) -> Body:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **values}

    def _body(self, status: str) -> Body:
        shared: Body = {"status": status, "error": None, "incomplete_details": None, "output": [], "usage": None}
        return self._head | self._asked | shared

    def _items(self, choice: Choice) -> list[Body]:
        message = self._chat.whole([choice])["choices"][0]["message"]
        items: list[Body] = []
        if message["content"] or not message.get("tool_calls"):
            items.append(self._message("completed", [_text_part(message["content"] or "")]))
        for call in message.get("tool_calls", []):
            item = {"type": "function_call", "id": f"fc_{secrets.token_hex(12)}", "call_id": call["id"]}
            items.append(item | call["function"] | {"status": "completed"})
        return items

    def _message(self, status: str, content: list[Body]) -> Body:
        return {
            "type": "message",
            "id": self._message_id,
            "role": "assistant",
            "status": status,
            "content": content,
        }


def _text_part(text: str) -> Body:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _read_input(fields: Fields) -> list[Body]:
    """The conversation as a chat has it."""
    messages: list[Body] = []
    if (told := fields.text("instructions")) is not None:
        messages.append({"role": "system", "content": told})
    value = fields.get("input")
    if isinstance(value, str):
        return [*messages, {"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise invalid("input", f"got {show(value)}, expected a string or a list of items")
    for number, item in enumerate(value):
        where = f"input[{number}]"
        if not isinstance(item, dict):
            raise invalid(where, f"got {show(item)}, expected an object")
        match item.get("type", "message"):
            case "message":
                messages.append({"role": item.get("role"), "content": _read_content(item.get("content"), where)})
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            case "function_call_output":
                said = {"tool_call_id": item.get("call_id"), "content": item.get("output")}
                messages.append({"role": "tool", **said})
            case kind:
                raise invalid(f"{where}.type", f"got {show(kind)}, expected message, function_call or its output")
    return messages


def _read_content(content: object, where: str) -> object:
    if not isinstance(content, list):
        return content
    parts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in PARTS or not isinstance(part.get("text"), str):
            raise invalid(f"{where}.content[{number}]", f"got {show(part)}, expected a part of type input_text")
        parts.append(part["text"])
    return "".join(parts)


def _read_format(fields: Fields) -> Body | None:
    text = fields.table("text")
    form = None if text is None else text.table("format")
    if text is None or form is None:
        return None
    asked = text.get("format")
    assert isinstance(asked, dict)
    if asked.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"name": asked.get("name"), "schema": asked.get("schema")}}
    return dict(asked)


def _read_tool(tool: object) -> object:
    """A function as a chat has it: one level deeper."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
