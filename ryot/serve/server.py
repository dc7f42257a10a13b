"""The process: uvicorn around the application, models that load while it already listens, and an end that drains."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import uvicorn

from ryot.edge.telemetry import Metric, Sender
from ryot.errors import ConfigError, RyotError
from ryot.serve.app import Service, build_app
from ryot.serve.metrics import telemetry_metrics
from ryot.serve.model import ModelOptions, ServedModel

_log = logging.getLogger(__name__)

#: How often it is looked whether a model that was replaced has still something to do.
RETIRE_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Where a server listens and what it allows."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    share_prefixes: bool = False
    max_body_bytes: int = 4_000_000
    timeout_s: float = 600.0
    """For a whole request."""
    drain_s: int = 30
    """For requests under way when the server is told to end."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    metrics_to: str | None = None
    """OTLP receiver that gets counts and latencies; None: nobody does."""

    def __post_init__(self) -> None:
        if not self.api_keys and not is_loopback(self.host):
            raise ConfigError(
                f"host: got {self.host}, which other machines can reach, and no API key",
                hint="give --api-key, or RYOT_API_KEY, or listen on 127.0.0.1",
            )
        if any(not key.isascii() or not key.strip() or key != key.strip() for key in self.api_keys):
            raise ConfigError("api-key: expected ASCII characters without space around them")
        if (self.tls_key is None) != (self.tls_certificate is None):
            raise ConfigError("TLS needs both a certificate and its key")
        if self.tls_certificate is not None and self.tls_key is not None:
            _check_certificate(self.tls_certificate, self.tls_key)


def _check_certificate(certificate: Path, key: Path) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"TLS: {certificate} and {key} are no certificate and key in PEM ({error})") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def run_server(
    bundles: Sequence[Path],
    model_options: ModelOptions,
    options: ServerOptions,
    on_ready: Callable[[str, Sequence[ServedModel]], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; `on_ready` is told the address and the models. Raises `RyotError`."""
    service = Service(
        api_keys=options.api_keys,
        share_prefixes=options.share_prefixes,
        max_body_bytes=options.max_body_bytes,
        timeout_s=options.timeout_s,
    )
    listener = _listen(options.host, options.port)
    config = uvicorn.Config(
        build_app(service),
        http=_find_protocol(),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=options.drain_s,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
    )
    server = _Server(config, service)
    scheme = "http" if options.tls_certificate is None else "https"
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{scheme}://{host}:{listener.getsockname()[1]}"

    async def serve() -> None:
        reloader = _Reloader(service, bundles, model_options)
        service.reload = reloader.reload
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.request)
        loading = asyncio.create_task(reloader.load())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.wait({loading, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is None and on_ready is not None:
            on_ready(address, list(service.models.values()))
        if loading.done() and loading.exception() is not None:
            server.should_exit = True
        await serving
        # The loop leaves a signal to the system, which would end the process before its models are closed.
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        loading.cancel()
        if loading.done() and not loading.cancelled():
            loading.result()

    def read_metrics() -> dict[int, list[Metric]]:
        runners = [model.runner for model in list(service.models.values())]
        return {id(runner): telemetry_metrics(runner.metrics, runner.scheduler) for runner in runners}

    sender = Sender(options.metrics_to, read_metrics) if options.metrics_to is not None else None
    try:
        # uvloop's where it is installed: it takes half the time for a token.
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(serve())
    finally:
        if sender is not None:
            sender.close()
        for model in service.models.values():
            model.close()


def _find_protocol() -> type[asyncio.Protocol] | Literal["h11"]:
    """The faster one where httptools is installed."""
    try:
        from ryot.serve.http_protocol import BoundedHttpProtocol
    except ImportError:
        return "h11"
    return BoundedHttpProtocol


async def _open_models(bundles: Sequence[Path], options: ModelOptions) -> dict[str, ServedModel]:
    models: dict[str, ServedModel] = {}
    for path in bundles:
        model = await asyncio.to_thread(ServedModel, path, options)
        if model.name in models:
            raise ConfigError(
                f"{path}: is named {model.name!r}, as {models[model.name].bundle.path} is",
                hint="serve them from two servers",
            )
        models[model.name] = model
    return models


class _Reloader:
    """Loads bundles, and puts those that have changed in the place of those that are served, without a lost request."""

    def __init__(self, service: Service, bundles: Sequence[Path], options: ModelOptions):
        self._service = service
        self._bundles = bundles
        self._options = options
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()

    async def load(self) -> None:
        """Load all bundles for the first time; a reload asked for meanwhile comes after. Raises `RyotError`."""
        async with self._one_at_a_time:
            models = await _open_models(self._bundles, self._options)
            for model in models.values():
                model.start()
            self._service.models = models

    def request(self) -> None:
        """Reload, as SIGHUP asks; a failure is logged and what is served stays."""
        self._keep(asyncio.create_task(self._reload_logged()))

    async def reload(self) -> list[str]:
        """Load all bundles and swap them in; their names. Raises `RyotError`, and nothing has changed then."""
        async with self._one_at_a_time:
            old = dict(self._service.models)
            models = await _open_models(self._bundles, self._options)
            for model in models.values():
                model.start()
            # Requests find either the old ones or the new ones; those under way hold on to the old ones.
            self._service.models = models
        for model in old.values():
            self._keep(asyncio.create_task(_retire(model)))
        return list(models)

    async def _reload_logged(self) -> None:
        try:
            _log.warning("reloaded: %s", ", ".join(await self.reload()))
        except RyotError as error:
            _log.error("what is served stays: %s", error)

    def _keep(self, task: asyncio.Task[object]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _retire(model: ServedModel) -> None:
    """Close a model when the last of its requests has ended."""
    while not model.runner.is_idle:
        await asyncio.sleep(RETIRE_POLL_S)
    await asyncio.to_thread(model.close)


class _Server(uvicorn.Server):
    """Tells the application when the end has begun."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server in order, and so with exit code 0; uvicorn would raise them again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        await super().shutdown(sockets=sockets)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises `ConfigError` where the address is taken or not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: cannot be listened on ({error.strerror})", hint="choose another --port"
        ) from error
    listener.set_inheritable(True)
    return listener
