"""`best_of` with a verifier, through OpenAI's own client."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

from ryot.edge.bundle import Bundle
from tests.serve.conftest import Server, metric, running

CHAT = "tiny-7"
KEPT: dict[str, object] = {"ignore_eos": True}
SAMPLED = {"model": CHAT, "max_tokens": 12, "temperature": 1.5, "seed": 3}


def ask(client: OpenAI, verifier: object, **options: object) -> dict[str, object]:
    body = {"verifier": verifier, "ignore_eos": True}
    found = client.completions.create(prompt="def add(", extra_body=body, **(SAMPLED | options))  # type: ignore
    return found.model_dump()


def test_the_answer_says_every_paths_reward_and_is_the_best_one(client: OpenAI) -> None:
    found = ask(client, {"kind": "regex", "pattern": "never 1"}, best_of=5)
    paths = found["verification"]["paths"]  # type: ignore[index]
    assert [path["index"] for path in paths] == [0, 1, 2, 3, 4]
    assert {path["reward"] for path in paths} == {0.0}
    assert len({path["text"] for path in paths}) == 5
    # What one candidate gives is what the same request without the others gives.
    alone = client.completions.create(prompt="def add(", extra_body={"ignore_eos": True}, **SAMPLED)  # type: ignore
    assert paths[0]["text"] == alone.choices[0].text
    wanted = paths[3]["text"]
    again = ask(client, {"kind": "exact", "answer": wanted}, best_of=5)
    (choice,) = again["choices"]  # type: ignore[misc]
    assert (choice["text"].strip(), choice["reward"], choice["index"]) == (wanted.strip(), 1.0, 0)


def test_candidates_share_one_prefill(server: Server, client: OpenAI) -> None:
    prompt = "class Shared prefix of many candidates 4711:"
    body = {"verifier": {"kind": "majority"}, "ignore_eos": True}
    names = ("vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total")
    before = [metric(server, name) for name in names]
    found = client.completions.create(prompt=prompt, best_of=4, extra_body=body, **SAMPLED)  # type: ignore
    prompts, known = (metric(server, name) - was for name, was in zip(names, before))
    assert found.usage is not None
    # The prompt was computed once, and its logits with it.
    assert (prompts, known) == (4 * found.usage.prompt_tokens, 3 * found.usage.prompt_tokens)
    assert {path["reward"] for path in found.model_dump()["verification"]["paths"]} == {0.25}


def test_candidates_end_when_enough_have_passed(client: OpenAI) -> None:
    # The server has 8 rows: of 40 candidates, 32 wait, and are given up on when the first has passed.
    found = ask(client, {"kind": "regex", "pattern": ""}, best_of=40, n=2, max_tokens=1000)
    assert [choice["reward"] for choice in found["choices"]] == [1.0, 1.0]  # type: ignore[attr-defined]
    paths = found["verification"]["paths"]  # type: ignore[index]
    assert sum(path["reward"] is None for path in paths) >= 30
    assert found["usage"]["completion_tokens"] < 30 * 1000  # type: ignore[index]


def test_a_chat_takes_candidates_too(client: OpenAI) -> None:
    found = client.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": "def add(a, b):"}],
        max_tokens=10,
        temperature=1.5,
        extra_body={"verifier": {"kind": "python"}, "best_of": 3, "ignore_eos": True},
    ).model_dump()
    rewards = [path["reward"] for path in found["verification"]["paths"]]
    (choice,) = found["choices"]
    assert choice["reward"] == max(reward for reward in rewards if reward is not None)


def test_of_equal_rewards_a_chat_answers_the_likeliest(client: OpenAI) -> None:
    asked = {"model": CHAT, "messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 8, "seed": 3}
    all_of_them = client.chat.completions.create(n=6, logprobs=True, temperature=1.5, extra_body=KEPT, **asked)  # type: ignore
    best = max(all_of_them.choices, key=lambda choice: sum(token.logprob for token in choice.logprobs.content))
    assert best.index
    verified = KEPT | {"verifier": {"kind": "exact", "answer": "never"}, "best_of": 6}
    found = client.chat.completions.create(temperature=1.5, extra_body=verified, **asked)  # type: ignore
    assert found.choices[0].message.content == best.message.content
    assert found.choices[0].logprobs is None


@pytest.mark.parametrize(
    ("verifier", "options", "param", "message"),
    [
        ({"kind": "rust"}, {}, "verifier.kind", "got 'rust', expected one of json"),
        ({"kind": "regex", "pattern": "("}, {}, "verifier.pattern", "is no regular expression"),
        (
            {"kind": "command", "command": "true"},
            {},
            "verifier.kind",
            "command runs programs, which is not allowed here",
        ),
        ({"kind": "python", "tests": "1"}, {}, "verifier.kind", "tests runs programs, which is not allowed here"),
        ({"kind": "json"}, {"stream": True}, "verifier", "cannot be streamed"),
        (3, {}, "verifier", "got 3, expected an object"),
    ],
)
def test_a_verifier_that_makes_no_sense_is_refused(
    client: OpenAI, verifier: object, options: dict[str, object], param: str, message: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        ask(client, verifier, **options)
    assert caught.value.param == param
    assert message in caught.value.message


def test_an_operator_may_let_commands_run(plain_bundle: Bundle, tmp_path: Path) -> None:
    with running(tmp_path, plain_bundle.path, "--allow-verifier", "command") as server:
        found = ask(server.client(), {"kind": "command", "command": ["grep", "-c", "."]}, model="tiny-1", best_of=2)
        assert found["choices"][0]["reward"] == 1.0  # type: ignore[index]
        with pytest.raises(BadRequestError, match="entry_point runs programs"):
            ask(server.client(), {"kind": "entry_point", "function": "builtins:max"}, model="tiny-1")
