"""The server's routes, and what every request passes: the key, the limits, the log, and errors as OpenAI has them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import ParamSpec, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ryot.errors import RyotError
from ryot.serve.answers import Body, Choice, Format, collect, stream
from ryot.serve.chat import ChatCompletion, encode_messages
from ryot.serve.completions import TextCompletion
from ryot.serve.errors import ApiError, api_error, invalid
from ryot.serve.fields import Fields, parse_body, show
from ryot.serve.metrics import PAGE_TYPE, render_metrics
from ryot.serve.model import ServedModel
from ryot.serve.openapi import describe_api
from ryot.serve.responses import ResponseAnswer

_log = logging.getLogger(__name__)
access_log = logging.getLogger("ryot.serve.access")

P = ParamSpec("P")
T = TypeVar("T")

#: Seconds in which a body must have come.
BODY_TIMEOUT_S = 60.0
#: What takes longer than a request up to so many bytes that asks for none of `SLOW_FIELDS`, or an answer of so many
#: tokens, is done beside asyncio's thread, where it would stop all streams. At these sizes either takes less than 1 ms;
#: the way to another thread and back takes 0.03 ms on an idle machine, and more where an engine computes.
QUICK_BODY_BYTES, QUICK_TOKENS = 1000, 200
SLOW_FIELDS = ("response_format", "structured_outputs", "text", "tools", "verifier")
#: Requests that are read at a time: more would only take the cores from the engine.
READERS = 2
#: Open without a key: whether the server lives is no secret, and the page asks for the key itself.
OPEN_PATHS = ("/", "/health", "/ready")
#: No prompts, only where a request went and how long it took.
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(slots=True)
class Service:
    """What the routes share."""

    api_keys: tuple[str, ...] = ()
    """Without any, everyone may ask."""
    share_prefixes: bool = False
    """Whether prompts of one key may use beginnings of another's."""
    max_body_bytes: int = 4_000_000
    timeout_s: float = 600.0
    """For a whole request."""
    models: dict[str, ServedModel] = field(default_factory=dict)
    """By name; empty while they load."""
    draining: bool = False
    reload: Callable[[], Awaitable[list[str]]] | None = None
    """Loads all bundles again and puts them in the place of those that are there; their names."""
    statuses: Counter[int] = field(default_factory=Counter)
    """Answers by HTTP status."""
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(READERS, "ryot-reader"))

    async def beside(self, quick: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns, done in another thread unless it is quick."""
        if quick:
            return work(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self.readers, partial(work, *args, **kwargs))

    def owner(self, request: Request) -> str:
        """Whose prompt it is, for the prefix cache."""
        return "" if self.share_prefixes else str(request.scope.get("ryot.key", ""))

    def dead_models(self) -> list[str]:
        """Models whose thread has ended without being told to: only a new process answers for them again."""
        if self.draining:
            return []
        return [name for name, model in self.models.items() if not model.runner.is_alive]

    def find(self, fields: Fields) -> ServedModel:
        """The model that a request names; the only one where it names none. Raises `ApiError`."""
        if self.draining or not self.models:
            what = "is shutting down" if self.draining else "is loading its models"
            raise ApiError(503, f"the server {what}", kind="server_error", code="unavailable", retry_after_s=1)
        name = fields.text("model")
        if name is None:
            if len(self.models) > 1:
                raise invalid("model", f"is missing, expected one of {', '.join(self.models)}")
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                404,
                f"model: got {show(name)}, expected one of {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]


def build_routes() -> list[Route]:
    """Every path that is answered."""
    return [
        Route("/", _page),
        Route("/health", _health),
        Route("/ready", _ready),
        Route("/metrics", _metrics),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/v1/completions", _completions, methods=["POST"]),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/v1/responses", _responses, methods=["POST"]),
        Route("/tokenize", _tokenize, methods=["POST"]),
        Route("/detokenize", _detokenize, methods=["POST"]),
        Route("/admin/reload", _reload, methods=["POST"]),
        Route("/openapi.json", _openapi),
    ]


def build_app(service: Service) -> ASGIApp:
    """The application; `service.models` may be filled later."""
    app = Starlette(
        routes=build_routes(),
        exception_handlers={ApiError: _answer_error, HTTPException: _answer_http_error, Exception: _answer_bug},
    )
    app.state.service = service
    return _Gate(app, service)


class _Gate:
    """Checks the key, counts and logs; nothing of a prompt goes into the log."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self._service = service
        # Prefixes are kept over a restart, where keys may stand in another order.
        self._keys = {hashlib.sha256(key.encode()).hexdigest(): key.encode() for key in service.api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status = 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if not self._keys and not _is_local_name(scope):
                # A page whose name was made to lead to this machine could else ask in a visitor's browser.
                error = ApiError(403, "Host: expected this machine's address or localhost", code="wrong_host")
                await _error_response(error)(scope, receive, watched)
            elif self._keys and scope["path"] not in OPEN_PATHS and not self._authorize(scope):
                error = ApiError(
                    401, "the API key is missing or wrong", kind="authentication_error", code="invalid_api_key"
                )
                await _error_response(error)(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        finally:
            self._service.statuses[status] += 1
            client = scope.get("client") or ("-", 0)
            access_log.info(
                json.dumps(
                    {
                        "client": client[0],
                        "method": scope["method"],
                        "path": scope["path"][:200],
                        "status": status,
                        "seconds": round(time.perf_counter() - began_s, 4),
                        **scope.get("ryot.log", {}),
                    }
                )
            )

    def _authorize(self, scope: Scope) -> bool:
        value = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, given = value.partition(b" ")
        # Each is compared, so that the time does not tell which one is close.
        matches = [name for name, key in self._keys.items() if hmac.compare_digest(key, given.strip())]
        if kind.lower() != b"bearer" or not matches:
            return False
        scope["ryot.key"] = matches[0]
        return True


def _is_local_name(scope: Scope) -> bool:
    """Whether a request was sent to an address, or to localhost, and not to a name that anyone can define."""
    value = next((value for name, value in scope["headers"] if name == b"host"), b"localhost").decode("latin-1")
    host = value[: value.find("]") + 1] if value.startswith("[") else value.partition(":")[0]
    if host in ("localhost", ""):
        return True
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


async def _health(request: Request) -> Response:
    dead = _service(request).dead_models()
    return JSONResponse({"status": "dead", "models": dead}, 503) if dead else JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    service = _service(request)
    if service.dead_models():
        status = "dead"
    else:
        status = "draining" if service.draining else "ready" if service.models else "loading"
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


async def _metrics(request: Request) -> Response:
    service = _service(request)
    models = {name: (model.runner.metrics, model.scheduler) for name, model in service.models.items()}
    return PlainTextResponse(render_metrics(models, service.statuses), media_type=PAGE_TYPE)


async def _page(request: Request) -> Response:
    return HTMLResponse(files("ryot.serve").joinpath("page.html").read_text(encoding="utf-8"))


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_describe(model) for model in _service(request).models.values()]})


async def _model(request: Request) -> Response:
    return JSONResponse(_describe(_service(request).find(Fields({"model": request.path_params["name"]}))))


def _describe(model: ServedModel) -> Body:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "ryot",
        "max_model_len": model.engine.max_len,
        "chat": model.template is not None,
    }


async def _completions(request: Request) -> Response:
    return await _answer(request, TextCompletion)


async def _chat(request: Request) -> Response:
    return await _answer(request, ChatCompletion)


async def _responses(request: Request) -> Response:
    return await _answer(request, ResponseAnswer)


async def _answer(request: Request, kind: Callable[[Fields, ServedModel, str], Format]) -> Response:
    service = _service(request)
    fields, quick = await _read_fields(request, service)
    model = service.find(fields)
    with model.runner.expected():
        answer = await service.beside(quick, kind, fields, model, service.owner(request))
        answer.submit()
    if answer.stream:
        return _EventStream(answer, service)
    choices = await _collect(request, answer, service.timeout_s)
    quick = sum(len(choice.tokens) for choice in choices) <= QUICK_TOKENS
    return await service.beside(quick, lambda: JSONResponse(answer.whole(choices)))


async def _collect(request: Request, answer: Format, timeout_s: float) -> Sequence[Choice]:
    """All choices; given up on when the client goes or the time is over."""
    whole = asyncio.create_task(collect(answer))
    gone = asyncio.create_task(_wait_until_gone(request))
    try:
        await asyncio.wait({whole, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if whole.done():
            return whole.result()
        if gone.done():
            raise ApiError(499, "the client has gone")
        raise _timeout(timeout_s)
    finally:
        for task in (whole, gone):
            task.cancel()
        answer.answers.close()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events, which end with the client."""

    def __init__(self, answer: Format, service: Service):
        self._answer = answer
        self._timeout_s = service.timeout_s
        super().__init__(stream(answer, self._note), media_type="text/event-stream", headers=SSE_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            data = json.dumps(_timeout(self._timeout_s).body()).encode()
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": False})
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._answer.answers.close()

    def _note(self, error: ApiError) -> None:
        _log.warning("a stream ended: %s", error)


def _timeout(timeout_s: float) -> ApiError:
    return ApiError(504, f"the answer took longer than {timeout_s:g} s", kind="server_error", code="timeout")


async def _tokenize(request: Request) -> Response:
    service = _service(request)
    fields, quick = await _read_fields(request, service)
    return await service.beside(quick, _answer_tokenize, fields, service.find(fields))


def _answer_tokenize(fields: Fields, model: ServedModel) -> Response:
    fields.refuse_unknown(("model", "prompt", "messages", "add_special_tokens", "chat_template_kwargs"))
    if fields.get("messages") is not None:
        ids = encode_messages(fields, model)
    else:
        text = fields.text("prompt")
        if text is None:
            raise invalid("prompt", "is missing, expected a string, or messages")
        try:
            ids = model.tokenizer.encode(text, add_special_tokens=fields.flag("add_special_tokens", True))
        except RyotError as error:
            raise api_error(error, "prompt") from error
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.engine.max_len})


async def _detokenize(request: Request) -> Response:
    service = _service(request)
    fields, quick = await _read_fields(request, service)
    return await service.beside(quick, _answer_detokenize, fields, service.find(fields))


def _answer_detokenize(fields: Fields, model: ServedModel) -> Response:
    fields.refuse_unknown(("model", "tokens"))
    tokens = fields.items("tokens")
    ids = [token for token in tokens if isinstance(token, int) and not isinstance(token, bool)]
    vocab_size = model.bundle.model.vocab_size
    if len(ids) != len(tokens) or any(not 0 <= token < vocab_size for token in ids):
        raise invalid("tokens", f"got {show(tokens)}, expected a list of token ids below {vocab_size}")
    return JSONResponse({"prompt": model.tokenizer.decode(ids)})


async def _reload(request: Request) -> Response:
    """Take the bundles from their folders again; requests under way end with the models that they began with."""
    service = _service(request)
    await _read_fields(request, service)
    if service.reload is None and service.models:
        raise ApiError(409, "what is served stays: on a cluster, deploy the bundles again", code="reload_failed")
    if service.reload is None or not service.models:
        raise ApiError(
            503, "the server is loading its models", kind="server_error", code="unavailable", retry_after_s=1
        )
    try:
        return JSONResponse({"reloaded": await service.reload()})
    except RyotError as error:
        raise ApiError(409, f"what is served stays: {error}", code="reload_failed") from error


async def _openapi(request: Request) -> Response:
    return JSONResponse(describe_api())


async def _read_fields(request: Request, service: Service) -> tuple[Fields, bool]:
    """The request's JSON, and whether what it asks for is quickly read.

    Raises `ApiError`, before the body has come where its length says that it is too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of another site can send a form or plain text to this machine, but no JSON.
    if kind != "application/json":
        raise ApiError(415, f"Content-Type: got {show(kind)}, expected application/json")
    limit = service.max_body_bytes
    too_large = ApiError(413, f"the body has more than {limit} bytes, which is the limit", code="request_too_large")
    if request.headers.get("content-length", "0").isdigit() and int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {BODY_TIMEOUT_S:g} s", code="timeout") from error
    fields = parse_body(bytes(data))
    quick = len(data) <= QUICK_BODY_BYTES and all(fields.get(name) is None for name in SLOW_FIELDS)
    return fields, quick


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    message = {404: f"{what}: there is no such path", 405: f"{what}: this path takes another method"}
    refused = ApiError(error.status_code, message.get(error.status_code, error.detail))
    return JSONResponse(refused.body(), refused.status, headers=dict(error.headers or {}))


async def _answer_bug(request: Request, error: Exception) -> Response:
    """The last resort: the client learns nothing but that it is our fault."""
    return _error_response(ApiError(500, "an error inside the server", kind="server_error"))
