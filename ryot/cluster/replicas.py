"""The server on Ray Serve: as many replicas as there is work for, each with the whole application and its own models.

A gateway reads the request and passes it on; the router sends prompts that begin alike to the same replica, where what
they have in common is known already, as long as that one is not full. More replicas come when requests queue up.
A second deployment under the same name replaces the first one replica by replica.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ryot.cluster import replica_names
from ryot.errors import ConfigError
from ryot.mapping import Unchecked
from ryot.serve.app import Service, build_app
from ryot.serve.errors import ApiError
from ryot.serve.metrics import PAGE_TYPE, merge_pages
from ryot.serve.model import ModelOptions, ServedModel
from ryot.serve.server import ServerOptions

_log = logging.getLogger(__name__)

APP_NAME = "ryot"
#: Before a replica's name, the key of what is for that one alone; no prompt has it, whose key holds a model and `/`.
REPLICA_KEY = "\x00"
REPLICA_HEADER = b"x-ryot-replica"
#: Characters of a prompt by which its replica is chosen: a system prompt and the beginning of what follows.
PREFIX_CHARACTERS = 2000
#: Arguments in a manifest that are fields of `ReplicaOptions`; others are the model's.
OWN_ARGS = ("share_prefixes", "max_body_bytes", "timeout_s", "drain_s", "min_replicas", "max_replicas")
DROPPED_HEADERS = (b"content-length", b"transfer-encoding", b"connection")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """How an application is deployed."""

    bundles: tuple[Path, ...]
    """Folders that every node sees under the same path."""
    model: ModelOptions
    api_keys: tuple[str, ...] = ()
    share_prefixes: bool = False
    max_body_bytes: int = 4_000_000
    timeout_s: float = 600.0
    drain_s: int = 30
    """For requests under way in a replica that is told to end."""
    min_replicas: int = 1
    max_replicas: int = 4

    @classmethod
    def of(
        cls, bundles: Sequence[Path], model: ModelOptions, server: ServerOptions, *, max_replicas: int
    ) -> ReplicaOptions:
        """The options with which one machine would be a server, for replicas."""
        return cls(
            bundles=tuple(path.resolve() for path in bundles),
            model=model,
            api_keys=server.api_keys,
            share_prefixes=server.share_prefixes,
            max_body_bytes=server.max_body_bytes,
            timeout_s=server.timeout_s,
            drain_s=server.drain_s,
            max_replicas=max_replicas,
        )


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Prefers the replica that a prompt's beginning belongs to, by rendezvous hashing; others when that one is full."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        replica_names.KNOWN[:] = sorted(str(replica.replica_id.unique_id) for replica in candidate_replicas)
        key = "" if pending_request is None else str(pending_request.kwargs.get("key", ""))
        if key.startswith(REPLICA_KEY):
            named = [one for one in candidate_replicas if REPLICA_KEY + one.replica_id.unique_id == key]
            if named:
                return [named]
        ranked = sorted(
            candidate_replicas,
            key=lambda replica: hashlib.sha256(f"{key}/{replica.replica_id.unique_id}".encode()).digest(),
        )
        return [ranked[:1], ranked[1:]] if len(ranked) > 1 else [ranked]


class Replica:
    """The application with its models, asked by the gateway."""

    def __init__(self, options: ReplicaOptions):
        models = [ServedModel(path, options.model) for path in options.bundles]
        service = Service(
            api_keys=options.api_keys,
            share_prefixes=options.share_prefixes,
            max_body_bytes=options.max_body_bytes,
            timeout_s=options.timeout_s,
        )
        self._models = models
        name = _replica_name()
        self._headers = [] if name is None else [(REPLICA_HEADER, name.encode())]
        for model in models:
            model.start()
        service.models = {model.name: model for model in models}
        self._app = build_app(service)

    async def answer(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes, *, key: str
    ) -> AsyncIterator[Any]:
        """Status and headers of an answer, then its body in pieces; `key` is for the router."""
        arrived: asyncio.Queue[Message] = asyncio.Queue()
        gone = asyncio.Event()
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await arrived.put(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": list(headers),
            "client": ("gateway", 0),
            "server": ("replica", 0),
        }
        running = asyncio.ensure_future(self._run(scope, receive, send))
        try:
            more = True
            while more:
                message = await arrived.get()
                if message["type"] == "http.response.start":
                    yield message["status"], [*message["headers"], *self._headers]
                else:
                    more = message.get("more_body", False)
                    yield message.get("body", b"")
        finally:
            # The gateway's client has gone, or all is said.
            gone.set()
            await running

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            # Where it breaks off nobody is to wait for more.
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def check_health(self) -> None:
        """Raise where an engine's thread has died."""
        for model in self._models:
            if not model.runner.is_alive:
                raise RuntimeError(f"{model.name}: its engine has ended")


class Gateway:
    """Where requests arrive."""

    def __init__(self, replicas: DeploymentHandle[Any], max_body_bytes: int):
        self._replicas = replicas.options(stream=True)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/metrics" and request.method == "GET":
            return await self._metrics(request)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_bytes:
                error = ApiError(413, f"the body has more than {self._max_body_bytes} bytes, which is the limit")
                return JSONResponse(error.body(), error.status)
        return await self._pass_on(request, bytes(body), prefix_key(bytes(body)))

    async def _pass_on(self, request: Request, body: bytes, key: str) -> Response:
        stream: Any = self._replicas.answer.remote(request.method, request.url.path, request.headers.raw, body, key=key)
        try:
            status, headers = await anext(stream)
        except (RayError, RayServeException) as error:
            refused = _replica_error(error)
            return JSONResponse(refused.body(), refused.status, headers=refused.headers())
        response = StreamingResponse(_read_on(stream, dict(headers)), status)
        response.raw_headers = [(name, value) for name, value in headers if name.lower() not in DROPPED_HEADERS]
        return response

    async def _metrics(self, request: Request) -> Response:
        """The figures of all replicas; what the first one says where it refuses, for want of a key perhaps."""
        pages: dict[str, str] = {}
        # Whoever answers first tells the router who else is there.
        for key in ["", *(REPLICA_KEY + name for name in replica_names.KNOWN)]:
            await self._read_page(request, key, pages)
        for name in set(replica_names.KNOWN) - pages.keys():
            await self._read_page(request, REPLICA_KEY + name, pages)
        if not pages:
            return await self._pass_on(request, b"", "")
        return PlainTextResponse(merge_pages(dict(sorted(pages.items()))), media_type=PAGE_TYPE)

    async def _read_page(self, request: Request, key: str, pages: dict[str, str]) -> None:
        stream: Any = self._replicas.answer.remote("GET", "/metrics", request.headers.raw, b"", key=key)
        try:
            status, headers = await anext(stream)
            page = b"".join([part async for part in stream]).decode()
        except (RayError, RayServeException):
            return  # it has ended meanwhile, and its figures with it
        if status == 200:
            pages[dict(headers)[REPLICA_HEADER].decode()] = page


async def _read_on(stream: AsyncIterator[bytes], headers: Mapping[bytes, bytes]) -> AsyncIterator[bytes]:
    """The pieces of an answer; where its replica ends, a stream of events ends with an error as any other does."""
    try:
        async for part in stream:
            yield part
    except (RayError, RayServeException) as error:
        if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            raise
        yield b"data: " + json.dumps(_replica_error(error).body()).encode() + b"\n\n"


def _replica_error(error: Exception) -> ApiError:
    if isinstance(error, RayTaskError):
        _log.error("a replica failed: %s", error)
        return ApiError(500, "an error inside the server", kind="server_error")
    return ApiError(
        503, "the replica that was to answer has ended", kind="server_error", code="unavailable", retry_after_s=1
    )


def _replica_name() -> str | None:
    """This replica's; None for one that Ray Serve does not run."""
    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return None


def prefix_key(body: bytes) -> str:
    """What a prompt begins with: requests with the same go to the same replica."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(asked, dict):
        return ""
    said = asked.get("messages") or asked.get("prompt") or ""
    if isinstance(said, list) and said and isinstance(said[0], dict):
        # What a conversation begins with stays; what was said last is new each time.
        said = said[: 1 + (said[0].get("role") in ("system", "developer"))]
    text = said if isinstance(said, str) else json.dumps(said)
    return f"{asked.get('model', '')}/{text[:PREFIX_CHARACTERS]}"


def build_application(options: ReplicaOptions) -> serve.Application:
    """What `serve.run` deploys."""
    rows = options.model.rows
    replicas = serve.deployment(
        name="model",
        max_ongoing_requests=4 * rows,
        ray_actor_options={"num_cpus": options.model.threads},
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas, max_replicas=options.max_replicas, target_ongoing_requests=rows
        ),
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),  # type: ignore[arg-type]
        health_check_period_s=5,
        graceful_shutdown_timeout_s=options.drain_s,
    )(Replica)
    gateway = serve.deployment(
        name="gateway", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}, num_replicas=1
    )(Gateway)
    application: serve.Application = gateway.bind(replicas.bind(options), options.max_body_bytes)
    return application


def build_from_config(args: Unchecked) -> serve.Application:
    """What a RayService manifest imports; `args` are those of `ReplicaOptions`, the model's beside them."""
    known = dict(args)
    if not (bundles := known.pop("bundles", None)):
        raise ConfigError("args.bundles: is missing, expected a list of folders")
    own = {name: known.pop(name) for name in OWN_ARGS if name in known}
    keys = Path(known.pop("api_keys_file")).read_text().split() if "api_keys_file" in known else ()
    try:
        model = ModelOptions(**known)
    except TypeError as error:
        raise ConfigError(f"args: {error}") from error
    return build_application(
        ReplicaOptions(bundles=tuple(Path(path) for path in bundles), model=model, api_keys=tuple(keys), **own)
    )
