"""OpenAI's own client against the server: what it parses is judged by the engine that serves one prompt."""

from __future__ import annotations

import json
import math
import time

import jsonschema
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from ryot.edge.bundle import Bundle
from ryot.edge.generate import generate
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.session import OnnxruntimeEngine
from ryot.edge.tokenizer import load_tokenizer
from tests.edge.reference import full_logits
from tests.serve.conftest import Server, metric

CHAT = "tiny-7"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]
RENDERED = "system: Be brief.\nuser: def add(a, b):\nassistant:"
IGNORE = {"ignore_eos": True}


def text_alone(
    bundle: Bundle, prompt: str | list[int], tokens: int, *, stop: tuple[str, ...] = (), seed: int = 0
) -> str:
    """What the engine for one prompt answers, greedy without a seed."""
    sampling = SamplingParams(temperature=1.0, seed=seed) if seed else None
    generation = generate(
        OnnxruntimeEngine(bundle),
        load_tokenizer(bundle),
        prompt,
        max_new_tokens=tokens,
        sampling=sampling,
        stop=stop,
        ignore_eos=True,
    )
    return "".join(generation)


def chat_ids(bundle: Bundle) -> list[int]:
    return load_tokenizer(bundle).encode(RENDERED, add_special_tokens=False)


def test_the_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-7", "tiny-1"]
    assert client.models.retrieve("tiny-1").owned_by == "ryot"


@pytest.mark.parametrize("seed", [0, 5])
def test_a_completion_is_what_the_engine_gives_alone(client: OpenAI, chat_bundle: Bundle, seed: int) -> None:
    found = client.completions.create(
        model=CHAT,
        prompt="def add(",
        max_tokens=30,
        temperature=1 if seed else 0,
        seed=seed,
        extra_body=IGNORE,
    )
    assert found.choices[0].text == text_alone(chat_bundle, "def add(", 30, seed=seed)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None and found.usage.completion_tokens == 30


def test_a_stream_is_the_whole_answer_in_pieces(client: OpenAI, chat_bundle: Bundle) -> None:
    stream = client.chat.completions.create(
        model=CHAT,
        messages=MESSAGES,
        max_completion_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=IGNORE,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == text_alone(chat_bundle, chat_ids(chat_bundle), 40)
    assert len(chunks) > 10
    assert all(chunk.usage is None for chunk in chunks[:-1])
    usage = chunks[-1].usage
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (len(chat_ids(chat_bundle)), 40)
    assert chunks[-2].choices[0].finish_reason == "length"


def test_several_choices_differ_and_the_first_is_the_only_one_of_the_same_seed(client: OpenAI) -> None:
    def texts(n: int) -> list[str]:
        answer = client.chat.completions.create(
            model=CHAT, messages=MESSAGES, max_tokens=12, seed=11, n=n, extra_body=IGNORE
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.message.content or "" for choice in answer.choices]

    three = texts(3)
    assert len(set(three)) == 3
    assert texts(1) == three[:1]


def test_prompts_come_as_texts_and_as_ids(client: OpenAI, chat_bundle: Bundle) -> None:
    ids = load_tokenizer(chat_bundle).encode("class A:")
    common = {"model": CHAT, "max_tokens": 8, "temperature": 0, "extra_body": IGNORE}
    by_text = client.completions.create(prompt=["class A:", "def b("], **common)  # type: ignore[call-overload]
    by_ids = client.completions.create(prompt=[ids], **common)  # type: ignore[call-overload]
    assert by_text.choices[0].text == by_ids.choices[0].text == text_alone(chat_bundle, "class A:", 8)
    assert by_text.choices[1].text == text_alone(chat_bundle, "def b(", 8)


def test_logprobs_and_echo_are_those_of_the_whole_pass(client: OpenAI, chat_bundle: Bundle) -> None:
    found = client.completions.create(
        model=CHAT, prompt="def add(a, b)", max_tokens=5, temperature=0, logprobs=2, echo=True, extra_body=IGNORE
    )
    tokenizer = load_tokenizer(chat_bundle)
    choice = found.choices[0]
    assert choice.text.startswith("def add(a, b)")
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.text_offset is not None
    ids = tokenizer.encode("def add(a, b)")
    generation = generate(OnnxruntimeEngine(chat_bundle), tokenizer, ids, max_new_tokens=5, ignore_eos=True)
    list(generation)
    ids += generation.completion.tokens
    logits = full_logits(chat_bundle, np.array(ids)).astype(np.float64)
    reference = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = [reference[at, token] for at, token in enumerate(ids[1:])]
    assert logprobs.token_logprobs[0] is None
    np.testing.assert_allclose(logprobs.token_logprobs[1:], expected, atol=2e-5)
    assert logprobs.top_logprobs is not None
    assert max(logprobs.top_logprobs[-1].values()) == pytest.approx(reference[-2].max(), abs=2e-5)
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)


def test_texts_can_be_scored_without_an_answer(client: OpenAI, chat_bundle: Bundle) -> None:
    """As lm-eval asks: token ids of several texts, echoed with their log probabilities, and no token more."""
    texts = [[5, 6, 7, 8], [9, 10], [11]]
    found = client.completions.create(
        model=CHAT, prompt=texts, max_tokens=0, temperature=0, logprobs=1, echo=True, seed=1
    )
    assert found.usage is not None and found.usage.completion_tokens == 0
    for ids, choice in zip(texts, found.choices, strict=True):
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        logits = full_logits(chat_bundle, np.array(ids)).astype(np.float64)
        reference = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = [reference[at, token] for at, token in enumerate(ids[1:])]
        assert choice.logprobs.token_logprobs[0] is None
        np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], expected, atol=2e-5)


def test_chat_logprobs_hold_bytes_and_alternatives(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=CHAT, messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3, extra_body=IGNORE
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 6
    for item in logprobs.content:
        assert item.logprob == max(top.logprob for top in item.top_logprobs) <= 0
        assert len(item.top_logprobs) == 3
    data = b"".join(bytes(item.bytes or []) for item in logprobs.content)
    assert data.decode("utf-8", "replace").startswith(answer.choices[0].message.content or "?")


def test_stop_strings_bias_and_penalties_reach_the_sampler(client: OpenAI, chat_bundle: Bundle) -> None:
    a = load_tokenizer(chat_bundle).encode("a")[-1]
    biased = client.chat.completions.create(
        model=CHAT, messages=MESSAGES, max_tokens=20, temperature=0, logit_bias={str(a): 100}, stop="aaaa"
    )
    assert (biased.choices[0].message.content, biased.choices[0].finish_reason) == ("", "stop")
    plain = client.chat.completions.create(
        model=CHAT, messages=MESSAGES, max_tokens=20, temperature=0, logit_bias={str(a): 100}
    )
    assert plain.choices[0].message.content == "a" * 20
    # The bias of 2 wins until the token has come often enough: 2 of penalty at a time take it back.
    penalized = client.chat.completions.create(
        model=CHAT, messages=MESSAGES, max_tokens=20, temperature=0, logit_bias={str(a): 20}, frequency_penalty=2
    )
    assert 0 < (penalized.choices[0].message.content or "").count("a") < 20


def test_best_of_returns_the_likeliest(client: OpenAI) -> None:
    common = {"model": CHAT, "prompt": "def ", "max_tokens": 6, "seed": 3, "logprobs": 0, "extra_body": IGNORE}
    every = client.completions.create(n=4, **common)  # type: ignore[call-overload]
    best = client.completions.create(n=1, best_of=4, **common)  # type: ignore[call-overload]
    assert best.choices[0].text == max(every.choices, key=lambda c: sum(c.logprobs.token_logprobs)).text
    assert best.usage.completion_tokens == 24


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_of_a_schema_validates(client: OpenAI, seed: int) -> None:
    answer = client.chat.completions.create(
        model=CHAT,
        messages=MESSAGES,
        seed=seed,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


def test_forms_of_vllm_are_understood(client: OpenAI) -> None:
    def text(form: dict[str, object]) -> str:
        body = {"structured_outputs": form}
        return client.completions.create(model=CHAT, prompt="x", max_tokens=30, seed=1, extra_body=body).choices[0].text

    assert text({"choice": ["yes", "no"]}) in ("yes", "no")
    assert text({"regex": "[0-9]{4}-[a-f]{2}"})[4] == "-"
    assert text({"grammar": 'root ::= "left" | "right"'}) in ("left", "right")


def test_a_second_turn_finds_its_beginning_known(client: OpenAI) -> None:
    first = [{"role": "user", "content": "A question that is long enough to be worth remembering, as most are."}]
    answer = client.chat.completions.create(model=CHAT, messages=first, max_tokens=20, seed=2, extra_body=IGNORE)  # type: ignore[arg-type]
    assert answer.usage is not None
    before = answer.usage.prompt_tokens
    again = [
        *first,
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "?"},
    ]
    second = client.chat.completions.create(model=CHAT, messages=again, max_tokens=4, extra_body=IGNORE)  # type: ignore[arg-type]
    details = second.usage and second.usage.prompt_tokens_details
    # The template's own last characters may join others into one token.
    assert details and details.cached_tokens is not None and details.cached_tokens >= before - 2


def test_a_prompt_beyond_the_context_says_both_numbers(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model="tiny-1", prompt="a b c " * 200, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert "tokens and 1 new ones do not fit the context of 256 tokens" in str(caught.value)
    with pytest.raises(BadRequestError, match="tiny-1 has no chat template"):
        client.chat.completions.create(model="tiny-1", messages=MESSAGES)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match="expected one of tiny-7, tiny-1"):
        client.completions.create(model="gpt-4", prompt="a")


def test_without_a_limit_a_chat_may_fill_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=0)  # type: ignore[arg-type]
    assert answer.usage is not None
    if answer.choices[0].finish_reason == "length":
        assert answer.usage.total_tokens == 2048
    assert math.isfinite(answer.usage.total_tokens)


@pytest.mark.parametrize(
    ("asked", "sampling"),
    [
        ({"top_p": 0.4}, {"top_p": 0.4}),
        ({"extra_body": {"min_p": 0.2}}, {"min_p": 0.2}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
    ],
    ids=["top_p", "min_p", "presence_penalty", "frequency_penalty"],
)
def test_what_a_sampler_is_told_is_what_it_does_alone(
    client: OpenAI, chat_bundle: Bundle, asked: dict[str, object], sampling: dict[str, float]
) -> None:
    body = {**IGNORE, **asked.pop("extra_body", {})}  # type: ignore[dict-item]
    options = {"model": CHAT, "prompt": "def add(", "max_tokens": 40, "temperature": 1.3, "seed": 4}
    found = client.completions.create(**options, **asked, extra_body=body)  # type: ignore[call-overload]
    plain = client.completions.create(**options, extra_body=IGNORE)  # type: ignore[call-overload]
    alone = generate(
        OnnxruntimeEngine(chat_bundle),
        load_tokenizer(chat_bundle),
        "def add(",
        max_new_tokens=40,
        sampling=SamplingParams(temperature=1.3, seed=4, **sampling),  # type: ignore[arg-type]
        ignore_eos=True,
    )
    assert found.choices[0].text == "".join(alone) != plain.choices[0].text


def test_a_stream_of_several_texts_is_the_whole_answer_in_pieces(client: OpenAI) -> None:
    asked = {"model": CHAT, "prompt": "def add(", "max_tokens": 12, "temperature": 1.2, "seed": 2}
    asked |= {"n": 3, "echo": True, "logprobs": 2, "extra_body": IGNORE}
    whole = client.completions.create(**asked)  # type: ignore[call-overload]
    texts, tokens, usage = {0: "", 1: "", 2: ""}, {0: [], 1: [], 2: []}, None
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += [] if choice.logprobs is None else choice.logprobs.tokens
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert choice.text.startswith("def add(")
    assert usage == whole.usage


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_answer_that_ends_is_a_json_object(client: OpenAI, seed: int) -> None:
    found = client.chat.completions.create(
        model=CHAT,
        messages=MESSAGES,
        max_tokens=400,
        temperature=1.0,
        seed=seed,
        response_format={"type": "json_object"},
    )
    (choice,) = found.choices
    assert choice.finish_reason in ("stop", "length")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_stream_that_is_closed_frees_its_row(server: Server, client: OpenAI) -> None:
    before = metric(server, 'vllm:request_success_total{model_name="tiny-7",finished_reason="abort"}')
    stream = client.completions.create(
        model=CHAT, prompt="def add(", max_tokens=2000, stream=True, extra_body=IGNORE, temperature=0
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while metric(server, 'vllm:request_success_total{model_name="tiny-7",finished_reason="abort"}') == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while metric(server, 'vllm:num_requests_running{model_name="tiny-7"}'):
        assert time.monotonic() < deadline
        time.sleep(0.02)
