"""Tools in a chat: what the model is told of them, the form that a call must have, and calls read out of an answer.

Models write calls in several ways. Read are the two that most templates of small models teach: JSON objects with `name`
and `arguments` (or `parameters`), bare, in a list, or between `<tool_call>` tags, as Qwen, SmolLM, Granite, Llama and
Hermes have it. Where a call is required the answer is constrained to that form, so that it can always be read.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ryot.serve.constraints import Form
from ryot.serve.errors import invalid
from ryot.serve.fields import Fields, show
from ryot.serve.model import ServedModel

OPEN, CLOSE = "<tool_call>", "</tool_call>"
#: What may stand before a list of calls or a call, by family.
MARKS = ("<|tool_call|>", "<|python_tag|>", "[TOOL_CALLS]")
MAX_TOOLS = 128
CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class Call:
    """One call that an answer makes."""

    name: str
    arguments: str
    """JSON of an object."""

    def body(self, index: int | None = None) -> dict[str, object]:
        """As OpenAI has it; with an index in a stream."""
        called = {"name": self.name, "arguments": self.arguments}
        head: dict[str, object] = {} if index is None else {"index": index}
        return head | {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": called}


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request."""

    described: list[dict[str, object]]
    """For the template, as they came."""
    parameters: dict[str, Mapping[str, object]]
    """JSON schema of each function's arguments."""
    required: tuple[str, ...]
    """Functions of which one must be called; none where the model may choose."""
    several: bool
    """Whether an answer may make more than one call."""

    def form(self, model: ServedModel) -> Form | None:
        """The form of an answer that must call; None where it need not. Raises `ConfigError`."""
        if not self.required:
            return None
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": self.parameters[name]},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name in self.required
        ]
        return model.grammars.build_json(calls[0] if len(calls) == 1 else {"anyOf": calls})

    def read(self, text: str) -> tuple[str, list[Call]]:
        """What an answer says, and the calls that it makes; all of it is text where it makes none."""
        said, parts = _cut(text)
        calls = [call for part in parts for call in self._read_part(part)]
        if not calls:
            return text, []
        return said.strip(), calls if self.several else calls[:1]

    def certain_text(self, text: str) -> int:
        """Characters of an answer that has not ended which belong to no call, whatever comes."""
        stripped = text.lstrip()
        if not stripped or stripped[0] in "{[":
            return 0
        return min(_find_begun(text, mark) for mark in (OPEN, *MARKS))

    def _read_part(self, text: str) -> list[Call]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        values = value if isinstance(value, list) else [value]
        calls = []
        for item in values:
            if not isinstance(item, dict):
                return []
            inner = item.get("function")
            call = inner if isinstance(inner, dict) else item
            name = call.get("name")
            arguments = call.get("arguments", call.get("parameters", {}))
            if not isinstance(name, str) or name not in self.parameters:
                return []
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except (ValueError, RecursionError):
                    return []
            if not isinstance(arguments, dict):
                return []
            calls.append(Call(name, json.dumps(arguments, ensure_ascii=False)))
        return calls


def read_tools(fields: Fields, model: ServedModel) -> Tools | None:
    """The request's tools; None where it has none, or wants none used. Raises `ApiError`."""
    values = fields.items("tools")
    choice = fields.get("tool_choice")
    if not values:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "is only for a request with tools")
        return None
    if len(values) > MAX_TOOLS:
        raise invalid("tools", f"got {len(values)}, expected at most {MAX_TOOLS}")
    described: list[dict[str, object]] = []
    parameters: dict[str, Mapping[str, object]] = {}
    for number, value in enumerate(values):
        name, schema = _read_function(value, f"tools[{number}]")
        if name in parameters:
            raise invalid(f"tools[{number}].function.name", f"{show(name)} was there before")
        assert isinstance(value, dict)
        described.append(value)
        parameters[name] = schema
    if model.tool_template is None or "tools" not in model.tool_template.source:
        raise invalid("tools", "this model's chat template takes no tools")
    required = _read_choice(choice, tuple(parameters))
    if choice == "none":
        return None
    return Tools(described, parameters, required, fields.flag("parallel_tool_calls", True))


def _read_function(value: object, where: str) -> tuple[str, Mapping[str, object]]:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise invalid(where, f"got {show(value)}, expected an object of type function")
    function = Fields(value, f"{where}.").table("function")
    name = None if function is None else function.text("name")
    if function is None or not name or len(name) > 64 or not all(c.isalnum() or c in "_-." for c in name):
        raise invalid(f"{where}.function.name", f"got {show(name)}, expected up to 64 letters, digits, _ . and -")
    function.text("description")
    if function.table("parameters") is None:
        return name, {"type": "object"}
    schema = function.get("parameters")
    assert isinstance(schema, dict)
    return name, schema


def _read_choice(choice: object, names: Sequence[str]) -> tuple[str, ...]:
    """The functions of which one must be called."""
    match choice:
        case None | "none" | "auto":
            return ()
        case "required":
            return tuple(names)
        case {"type": "function", "function": {"name": str(name)}} if name in names:
            return (name,)
    expected = f"none, auto, required, or a function among {', '.join(names)}"
    raise invalid("tool_choice", f"got {show(choice)}, expected {expected}")


def _find_begun(text: str, mark: str) -> int:
    """Where a mark stands in the text, or begins at its end; the text's length where neither is so."""
    if (at := text.find(mark)) >= 0:
        return at
    begun = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    return len(text) - begun


def _cut(text: str) -> tuple[str, list[str]]:
    """What stands outside of calls, and what may be calls."""
    if OPEN in text:
        said, *rest = text.split(OPEN)
        parts = [part.partition(CLOSE) for part in rest]
        return said + "".join(after for _, _, after in parts), [inside for inside, _, _ in parts]
    stripped = text.strip()
    for mark in MARKS:
        if mark in stripped:
            said, _, inside = stripped.partition(mark)
            return said, [inside]
    return ("", [stripped]) if stripped[:1] in ("{", "[") else (text, [])
