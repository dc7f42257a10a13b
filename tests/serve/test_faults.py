"""Clients that do not say what they began to, and an engine that dies."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from openai import InternalServerError, OpenAI

from ryot.edge.bundle import Bundle
from ryot.edge.sequence import TokenEvent
from ryot.serve import app, http_protocol
from ryot.serve.app import Service, build_app
from ryot.serve.http_protocol import BoundedHttpProtocol
from ryot.serve.model import ModelOptions, ServedModel


@contextmanager
def serving(service: Service) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(build_app(service), http=BoundedHttpProtocol, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def say(port: int, *parts: bytes) -> tuple[int, dict[str, object]]:
    """Status and body of the answer to bytes, sent with time between them."""
    with socket.create_connection(("127.0.0.1", port), 30) as raw:
        for number, part in enumerate(parts):
            time.sleep(0.1 * (number > 0))
            raw.sendall(part)
        head, _, body = raw.makefile("rb").read().partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "parts",
    [(), (b"POST /v1/completions HT",), (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X: 1\r\n")],
    ids=["nothing", "half a line", "no end"],
)
def test_a_head_that_does_not_come_is_given_up_on(monkeypatch: pytest.MonkeyPatch, parts: tuple[bytes, ...]) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.5)
    with serving(Service()) as port:
        status, found = say(port, *parts)
    assert (status, found["error"]["code"]) == (408, "timeout")  # type: ignore[index]
    assert "headers did not come within 0.5 s" in str(found)


def test_a_body_that_does_not_come_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(Service()) as port:
        # Its head has come in time, so that the other limit is not in force any more.
        status, found = say(port, head + b"Content-Length: 100\r\nConnection: close\r\n\r\n{", b"}")
    assert status == 408 and "body did not come within 0.5 s" in str(found)


@pytest.mark.parametrize(("draining", "status"), [(False, "loading"), (True, "draining")])
def test_before_the_models_are_there_and_at_the_end_a_client_is_told_to_come_again(draining: bool, status: str) -> None:
    with serving(Service(draining=draining)) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        asked = {"model": "tiny-7", "messages": [{"role": "user", "content": "a"}]}
        calls = (
            lambda: client.completions.create(model="tiny-7", prompt="a"),
            lambda: client.chat.completions.create(**asked, stream=True),  # type: ignore[call-overload]
            lambda: client.responses.create(model="tiny-7", input="a"),
            lambda: client.models.retrieve("tiny-7"),
        )
        for call in calls:
            with pytest.raises(InternalServerError, match="the server is") as caught:
                call()
            response = caught.value.response
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
            assert response.json()["error"]["code"] == "unavailable"
        for path, found in ((b"/ready", (503, {"status": status})), (b"/health", (200, {"status": "ok"}))):
            assert say(port, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") == found


class Panic(BaseException):
    """What a library in Rust raises when it gives up: no `Exception`."""


def test_whatever_a_step_raises_is_told_and_the_next_request_answered(
    chat_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ServedModel(chat_bundle.path, ModelOptions(rows=2))
    step, calls = model.scheduler.step, []

    def fail_once() -> list[TokenEvent]:
        calls.append(None)
        if len(calls) == 2:
            raise Panic("given up")
        return step()

    monkeypatch.setattr(model.scheduler, "step", fail_once)
    model.start()
    with serving(Service(models={model.name: model})) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        asked = {"model": model.name, "prompt": "def add(", "max_tokens": 4, "extra_body": {"ignore_eos": True}}
        with pytest.raises(InternalServerError, match="an error inside the server"):
            client.completions.create(**asked)  # type: ignore[call-overload]
        found = client.completions.create(**asked)  # type: ignore[call-overload]
        assert found.usage.completion_tokens == 4
        assert say(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0] == 200
        model.runner.stop()
        for path in (b"/health", b"/ready"):
            request = b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            status, body = say(port, request)
            assert (status, body["status"]) == (503, "dead")
