"""A connection of this process to Ray that changes nothing else in it: stdout, signals and environment stay ours."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ryot.cluster.address import describe_address
from ryot.errors import ClusterError
from ryot.run.signals import hold_signals

log = logging.getLogger(__name__)


@contextlib.contextmanager
def ray_connection(arguments: dict[str, Any], environment: Mapping[str, str | None], log_dir: Path) -> Iterator[None]:
    """Connected to Ray, with stdout, the signal handlers and the environment as they were."""
    where = arguments["address"] if arguments["address"] == "local" else describe_address(arguments["address"])
    with _quiet(log_dir / "ray.log") as said, _environment(environment), _own_signal_handlers() as put_back:
        import ray
        import ray._private.worker

        if ray.is_initialized():
            raise ClusterError(
                "this process is connected to a Ray cluster already", hint="one cluster per process at a time"
            )
        _reread_environment()
        # Ray prints failures of its raylets to stdout even with log_to_driver=False.
        setattr(ray._private.worker, "print_worker_logs", _log_instead_of_printing)  # noqa: B010 (mypy: it has another type)
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
        except Exception as error:  # Ray raises a bare one where its node manager is slow to start
            with contextlib.suppress(Exception):
                _shut_down(put_back)
            raise _explain(error, where, said.read_text(errors="replace")) from error
        except KeyboardInterrupt:
            with hold_signals(), contextlib.suppress(Exception):
                _shut_down(put_back)
            raise
    try:
        yield
    finally:
        with _quiet(log_dir / "ray.log"), _own_signal_handlers() as put_back:
            _shut_down(put_back)


def _shut_down(put_back: Callable[[], None]) -> None:
    """`ray.shutdown`, with our handlers in place while it ends its processes, which takes a second.

    Its core sets SIGTERM back to ending this process as soon as it is gone, behind Python's back.
    """
    import ray
    import ray._private.state

    state: Any = ray._private.state.state
    disconnect = state.disconnect

    def disconnect_and_put_back() -> None:
        put_back()
        disconnect()

    # The first that is called after the core is gone.
    state.disconnect = disconnect_and_put_back
    try:
        ray.shutdown()
    finally:
        del state.disconnect


def _reread_environment() -> None:
    """Make Ray take its settings from the environment of now: it has read some when it was first imported."""
    import ray._raylet
    from ray._private import ray_constants

    compiled: Any = ray._raylet
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()
    constants: Any = ray_constants
    several_hosts = constants.env_bool(constants.ENABLE_RAY_CLUSTERS_ENV_VAR, True)
    setattr(ray_constants, "ENABLE_RAY_CLUSTER", several_hosts)  # noqa: B010 (mypy: it takes it for a constant)


def _explain(error: Exception, where: str, said: str) -> ClusterError:
    """Ray's failure to connect in one line; some of its reasons stand only in what it wrote to stderr."""
    everything = f"{error}\n{said}"
    if "ersion mismatch" in everything:
        reason = " ".join(str(error).split())
        return ClusterError(
            f"{where}: its versions are not ours: {reason}",
            hint="install the same Ray and Python minor version on the cluster and here",
        )
    if "nauthenticated" in everything or "UNAUTHENTICATED" in everything or "token" in str(error).lower():
        given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
        return ClusterError(
            f"{where}: it {'does not accept our' if given else 'demands a'} token",
            hint="set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token",
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if where == "local":
        return ClusterError(
            f"embedded Ray does not start: {first}", hint="logs/ray.log in the run folder has what Ray said"
        )
    return ClusterError(
        f"{where}: cannot connect: {first}", hint="check the address with 'ray status --address HOST:PORT'"
    )


def _log_instead_of_printing(data: Mapping[str, Any], sink: object, *rest: object) -> None:
    for line in data.get("lines", []):
        log.info("ray: %s", line)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """`os.environ` with `changes` (None removes), and as it was afterwards."""
    before = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[Callable[[], None]]:
    """Ray replaces the handler of SIGTERM; this puts ours back, at the end and whenever what it gives is called."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield put_back
    finally:
        put_back()


@contextlib.contextmanager
def _quiet(path: Path) -> Iterator[Path]:
    """Python's stdout and the process's stderr go to `path`: Ray's C++ writes to the descriptor itself."""
    with path.open("a", encoding="utf-8") as sink, contextlib.redirect_stdout(sink):
        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield path
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
