"""`/v1/responses` through OpenAI's own client, held against the chat that answers the same."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI

from tests.serve.test_tools import SCHEMA

TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA}
GREEDY: dict[str, Any] = {"model": "tiny-7", "temperature": 0, "extra_body": {"ignore_eos": True}}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]


def chat_text(client: OpenAI) -> str:
    found = client.chat.completions.create(messages=TALK, max_tokens=20, **GREEDY)
    return found.choices[0].message.content or ""


def test_a_response_is_the_chats_answer(client: OpenAI) -> None:
    found = client.responses.create(input="def add(a, b):", instructions="Be brief.", max_output_tokens=20, **GREEDY)
    assert found.output_text == chat_text(client)
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    assert found.usage.output_tokens == 20 and found.usage.total_tokens == found.usage.input_tokens + 20
    parts = [{"role": m["role"], "content": [{"type": "input_text", "text": m["content"]}]} for m in TALK]
    assert client.responses.create(input=parts, max_output_tokens=20, **GREEDY).output_text == found.output_text


def test_a_stream_of_events_adds_up_to_it(client: OpenAI) -> None:
    events = list(client.responses.create(input=TALK, max_output_tokens=20, stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == events[-1].response.output_text == chat_text(client)


def test_forms_and_tools_reach_the_chat(client: OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny-7", "input": "How is it?", "max_output_tokens": 200}
    form = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA}}
    found = client.responses.create(text=form, **common)
    jsonschema.validate(json.loads(found.output_text), SCHEMA)
    found = client.responses.create(tools=[TOOL], tool_choice={"type": "function", "name": "weather"}, **common)
    (call,) = found.output
    assert call.type == "function_call" and call.name == "weather"
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    history = [
        {"role": "user", "content": "How is it?"},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."},
    ]
    assert client.responses.create(model="tiny-7", input=history, tools=[TOOL], max_output_tokens=4).id
    streamed = list(client.responses.create(tools=[TOOL], tool_choice="required", stream=True, **common))
    items = [event.item for event in streamed if event.type == "response.output_item.done"]
    assert [item.name for item in items] == ["weather"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": []}, "input: got"),
        ({"input": [{"type": "reasoning"}]}, r"input\[0\].type"),
        ({"input": "a", "previous_response_id": "resp_1"}, "nothing is kept"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_not_understood_is_named(client: OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        client.responses.create(model="tiny-7", **options)
