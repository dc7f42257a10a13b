"""Tools in a chat, through OpenAI's own client: what it parses validates against what was asked for."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI

from ryot.serve.tools import Call, Tools

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
MESSAGES = [{"role": "user", "content": "How is it?"}]


def ask(client: OpenAI, **options: Any) -> Any:
    given = {"model": "tiny-7", "messages": MESSAGES, "tools": [WEATHER, CLOCK], "max_tokens": 200, "seed": 3}
    return client.chat.completions.create(**(given | options))


def test_a_named_tool_is_called_with_arguments_of_its_schema(client: OpenAI) -> None:
    for seed in range(4):
        found = ask(client, tool_choice={"type": "function", "function": {"name": "weather"}}, seed=seed)
        choice = found.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.type == "function" and call.function.name == "weather"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_a_required_call_is_one_of_the_tools(client: OpenAI) -> None:
    found = ask(client, tool_choice="required", tools=[WEATHER], n=3)
    for choice in found.choices:
        assert choice.message.tool_calls[0].function.name == "weather"


def test_a_stream_brings_the_call_that_the_whole_answer_has(client: OpenAI) -> None:
    options: dict[str, Any] = {"tool_choice": "required", "tools": [WEATHER], "temperature": 0}
    whole = ask(client, **options).choices[0].message.tool_calls[0].function
    chunks = list(ask(client, stream=True, **options))
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (0, whole.name, whole.arguments)
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_an_answer_without_a_call_is_text(client: OpenAI) -> None:
    free = client.chat.completions.create(
        model="tiny-7", messages=MESSAGES, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    none = ask(client, tool_choice="none", max_tokens=20, temperature=0, extra_body={"ignore_eos": True})
    assert none.choices[0].message.content == free.choices[0].message.content
    auto = ask(client, max_tokens=20, temperature=0, extra_body={"ignore_eos": True})
    assert auto.choices[0].message.tool_calls is None and auto.choices[0].message.content
    # The tools stand in the prompt.
    assert auto.usage.prompt_tokens > none.usage.prompt_tokens
    chunks = list(ask(client, max_tokens=20, temperature=0, stream=True, extra_body={"ignore_eos": True}))
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == auto.choices[0].message.content


def test_a_call_and_its_result_go_back_into_the_chat(client: OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
    ]
    assert ask(client, messages=messages).choices[0].message is not None
    for arguments in ("{", "[" * 100_000):
        call["function"]["arguments"] = arguments  # type: ignore[index]
        with pytest.raises(BadRequestError, match=r"messages\[1\].tool_calls\[0\].function.arguments"):
            ask(client, messages=messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "rain"}}}, "expected none, auto, required"),
        ({"tools": [WEATHER, WEATHER]}, "was there before"),
        ({"tools": [{"type": "file_search"}]}, "expected an object of type function"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude each other"),
    ],
)
def test_tools_that_make_no_sense_are_refused(client: OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        ask(client, **options)


def test_a_model_whose_template_knows_no_tools_says_so(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="takes no tools"):
        client.chat.completions.create(model="tiny-1", messages=MESSAGES, tools=[CLOCK])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "form",
    [
        {"type": "regex", "regex": "[ab]{3}-[0-9]{2}"},
        {"type": "grammar", "grammar": 'root ::= ("a" | "b") ("a" | "b") [ab] "-" [0-9] [0-9]'},
        {"type": "grammar", "grammar": "start: /[ab]{3}-[0-9]{2}/"},
    ],
)
def test_an_answer_has_the_form_of_a_regex_or_grammar(client: OpenAI, form: dict[str, str]) -> None:
    for seed in range(3):
        found = client.chat.completions.create(
            model="tiny-7",
            messages=MESSAGES,
            max_tokens=40,
            seed=seed,
            response_format=form,  # type: ignore[call-overload]
        )
        assert re.fullmatch("[ab]{3}-[0-9]{2}", found.choices[0].message.content), found


TOOLS = Tools([], {"weather": SCHEMA, "clock": {}}, (), True)
ROME = Call("weather", '{"city": "Rome"}')
DEEP_CALL = json.dumps({"name": "clock", "arguments": "[" * 100_000})


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ('{"name": "weather", "arguments": {"city": "Rome"}}', "", [ROME]),
        ('{"name": "weather", "parameters": {"city": "Rome"}}', "", [ROME]),
        ('{"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}}', "", [ROME]),
        ('Let me see. <tool_call>\n{"name": "clock"}\n</tool_call>', "Let me see.", [Call("clock", "{}")]),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><tool_call>{"name": "clock"}',
            "",
            [ROME, Call("clock", "{}")],
        ),
        ('[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]', "", [ROME]),
        ('{"name": "rain", "arguments": {}}', '{"name": "rain", "arguments": {}}', []),
        ("{half", "{half", []),
        ("[1, 2]", "[1, 2]", []),
        ('{"name": ["clock"]}', '{"name": ["clock"]}', []),
        (DEEP_CALL, DEEP_CALL, []),
        ("It rains.", "It rains.", []),
    ],
)
def test_calls_are_read_as_models_write_them(text: str, said: str, calls: list[Call]) -> None:
    assert TOOLS.read(text) == (said, calls)


def test_text_that_may_yet_be_a_call_is_held_back() -> None:
    texts = ("", " ", ' {"na', "[", "It is", "a < b", "So <tool_", "So <tool_call>{")
    assert [TOOLS.certain_text(text) for text in texts] == [
        0, 0, 0, 0, 5, 5, 3, 3,
    ]  # fmt: skip
