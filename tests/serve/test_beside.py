"""What takes long is done beside asyncio's thread, which all streams share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from openai import OpenAI, RateLimitError

from ryot.edge.bundle import Bundle
from ryot.serve.app import QUICK_BODY_BYTES, READERS, Service
from ryot.serve.model import ModelOptions, ServedModel
from ryot.serve.server import _retire
from tests.serve.conftest import CONTEXT
from tests.serve.test_faults import serving

LONG = "def add(a, b): " * (QUICK_BODY_BYTES // 10)
TEXT = {"model": "tiny-7", "max_tokens": 2, "extra_body": {"ignore_eos": True}}
CHAT = TEXT | {"messages": [{"role": "user", "content": LONG}]}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"enum": list(range(300))}}}}


@pytest.fixture
def model(chat_bundle: Bundle) -> Iterator[ServedModel]:
    model = ServedModel(chat_bundle.path, ModelOptions(rows=4))
    model.start()
    yield model
    if model.runner.is_alive:
        model.runner.stop()


def open_client(port: int) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.mark.parametrize(
    ("asked", "owner", "method"),
    [
        ({"prompt": LONG}, "tokenizer", "encode"),
        ({"messages": CHAT["messages"]}, "template", "render"),
        ({"prompt": "a", "response_format": SCHEMA}, "grammars", "build_json"),
        ({"prompt": "a", "structured_outputs": {"regex": "(a|b){9}"}}, "grammars", "build_regex"),
        ({"prompt": "a", "max_tokens": 300}, "tokenizer", "token_bytes"),
    ],
    ids=["a long prompt", "a long chat", "a schema", "a regex", "many probabilities"],
)
def test_a_stream_goes_on_while_another_request_is_worked_on(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], owner: str, method: str
) -> None:
    holder = getattr(model, owner)
    work, begun, goes_on, threads = getattr(holder, method), threading.Event(), threading.Event(), set()

    def wait_and_work(*args: Any, **kwargs: Any) -> Any:
        threads.add(threading.current_thread().name)
        begun.set()
        assert goes_on.wait(20), "the stream has stopped"
        return work(*args, **kwargs)

    with serving(Service(models={model.name: model})) as port:
        client = open_client(port)
        stream = client.completions.create(prompt="a", stream=True, **(TEXT | {"max_tokens": CONTEXT - 10}))  # type: ignore
        next(stream)
        monkeypatch.setattr(holder, method, wait_and_work)
        ask = client.chat.completions.create if "messages" in asked else client.completions.create
        options = TEXT | {"logprobs": True if "messages" in asked else 1} | asked
        extra = {name: options.pop(name) for name in ("response_format", "structured_outputs") if name in options}
        options["extra_body"] = options["extra_body"] | extra
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.append(ask(**options)))
        asking.start()
        assert begun.wait(20)
        for _ in range(50):
            next(stream)
        goes_on.set()
        asking.join()
        stream.close()
    assert found and found[0].choices[0].finish_reason in ("length", "stop")
    assert all(name.startswith("ryot-reader") for name in threads), threads


def test_a_short_request_takes_no_way_through_another_thread(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, encode = set(), model.tokenizer.encode

    def note(*args: Any, **kwargs: Any) -> list[int]:
        threads.add(threading.current_thread().name)
        return encode(*args, **kwargs)

    monkeypatch.setattr(model.tokenizer, "encode", note)
    with serving(Service(models={model.name: model})) as port:
        open_client(port).completions.create(prompt="a", **TEXT)  # type: ignore[call-overload]
    assert len(threads) == 1 and not threads.pop().startswith("ryot-reader")


def test_a_model_that_is_replaced_answers_what_is_still_read(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, begun, goes_on = model.tokenizer.encode, threading.Event(), threading.Event()

    def wait_and_encode(*args: Any, **kwargs: Any) -> list[int]:
        begun.set()
        assert goes_on.wait(20)
        return encode(*args, **kwargs)

    async def retire() -> None:
        retiring = asyncio.create_task(_retire(model))
        # So often it has looked whether the model has anything to do.
        for _ in range(3):
            await asyncio.wait({retiring}, timeout=0.06)
        goes_on.set()
        await retiring

    monkeypatch.setattr(model.tokenizer, "encode", wait_and_encode)
    found: list[Any] = []
    with serving(Service(models={model.name: model})) as port:
        client = open_client(port)
        asking = threading.Thread(target=lambda: found.append(client.completions.create(prompt=LONG, **TEXT)))  # type: ignore[call-overload]
        asking.start()
        assert begun.wait(20)
        asyncio.run(retire())
        asking.join()
    assert found[0].usage.completion_tokens == 2 and not model.runner.is_alive


def test_no_more_are_read_than_may_wait(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, goes_on, entered = model.tokenizer.encode, threading.Event(), threading.Semaphore(0)

    def wait_and_encode(*args: Any, **kwargs: Any) -> list[int]:
        entered.release()
        assert goes_on.wait(20)
        return encode(*args, **kwargs)

    monkeypatch.setattr(model.tokenizer, "encode", wait_and_encode)
    monkeypatch.setattr(model.runner, "max_waiting", READERS)
    found: list[Any] = []
    with serving(Service(models={model.name: model})) as port:
        client = open_client(port)
        ask = partial(client.completions.create, prompt=LONG, **TEXT)  # type: ignore[call-overload]
        asking = [threading.Thread(target=lambda: found.append(ask())) for _ in range(READERS)]
        for thread in asking:
            thread.start()
            assert entered.acquire(timeout=20)
        with pytest.raises(RateLimitError, match=f"{READERS} requests wait, which is the limit"):
            ask()
        goes_on.set()
        for thread in asking:
            thread.join()
    assert len(found) == READERS


def test_more_messages_than_tokens_are_refused_before_a_template_sees_them(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "template", None if model.template is None else object())
    with serving(Service(models={model.name: model})) as port:
        messages = [{"role": "user", "content": ""}] * (CONTEXT + 1)
        with pytest.raises(Exception, match=f"got {CONTEXT + 1}, more than the {CONTEXT} tokens"):
            open_client(port).chat.completions.create(**(TEXT | {"messages": messages}))  # type: ignore[call-overload]
