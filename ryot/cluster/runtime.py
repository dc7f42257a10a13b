"""Ray for one run: an embedded cluster that leaves nothing behind, or a cluster that exists already.

    with open_cluster(ClusterOptions(), log_dir=run_dir / "logs") as cluster:
        ...

Ray is imported only here and in the modules of this package that run after this one, because much of it reads its
environment at import. The traps that the settings below avoid were found with Ray 2.60; `tests/cluster` tests each.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ryot.cluster import keeper
from ryot.cluster.address import probe_address, resolve_address
from ryot.errors import ClusterError

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]

#: Sockets below the temp folder have a path of at most 107 bytes, of which Ray needs 67.
MAX_TEMP_DIR_BYTES = 40

#: Keeps large tensors on the heap and backs them with huge pages: 1.0 to 1.15x in training, for every variant alike.
MALLOC_TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592:glibc.malloc.hugetlb=1"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterOptions:
    """Which Ray a run uses."""

    address: str | None = None
    """`HOST:PORT` or `auto` of a running cluster; None starts one on this machine for this run alone."""
    num_cpus: int | None = None
    """Cores of an embedded cluster; None for all that this process may use."""
    object_store_bytes: int = 80 * 2**20
    """Shared memory of an embedded cluster; Ray takes no less than 78,643,200."""
    malloc_tunables: str = MALLOC_TUNABLES
    """GLIBC_TUNABLES of the workers; empty for glibc's own settings."""
    bench_label: str = ""
    """Custom resource or label (`NAME` or `NAME=VALUE`) of the nodes that measure."""


@dataclass(frozen=True, slots=True)
class Node:
    """One living machine (or container) of the cluster."""

    node_id: str
    hostname: str
    ip: str
    cpus: float
    gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


class Cluster:
    """A connection to Ray; made by `open_cluster`."""

    def __init__(
        self, *, embedded: bool, address: str, options: ClusterOptions, worker_env: dict[str, str], start_s: float
    ):
        self.embedded = embedded
        self.address = address
        self.options = options
        self.worker_env = worker_env
        """What the workers have in their environment because of us."""
        self.start_s = start_s
        """Time from nothing to connected, importing Ray included."""
        self.shutdown_s: float | None = None
        self._closing = contextlib.ExitStack()

    def nodes(self) -> list[Node]:
        """The living nodes, in a stable order."""
        import ray

        found = []
        for info in ray.nodes():
            if not info["Alive"]:
                continue
            resources = info["Resources"]
            found.append(
                Node(
                    node_id=info["NodeID"],
                    hostname=info["NodeManagerHostname"],
                    ip=info["NodeManagerAddress"],
                    cpus=resources.get("CPU", 0.0),
                    gpus=resources.get("GPU", 0.0),
                    resources=resources,
                    labels=info.get("Labels") or {},
                )
            )
        return sorted(found, key=lambda n: (n.hostname, n.node_id))

    def describe(self) -> dict[str, Any]:
        """What a report says about the cluster."""
        import ray

        return {
            "embedded": self.embedded,
            "address": self.address,
            "ray": ray.__version__,
            "nodes": [{"host": n.hostname, "ip": n.ip, "cpus": n.cpus, "gpus": n.gpus} for n in self.nodes()],
            "worker_env": self.worker_env,
            "start_s": round(self.start_s, 3),
        }

    def shutdown(self) -> None:
        """Disconnect; an embedded cluster ends with all its processes and files. Does nothing the second time."""
        begin = time.monotonic()
        with self._closing:
            pass
        if self.shutdown_s is None:
            self.shutdown_s = time.monotonic() - begin

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()


def open_cluster(options: ClusterOptions, *, log_dir: Path) -> Cluster:
    """Start or join Ray; what Ray says meanwhile goes to files in `log_dir`.

    The calling thread must live as long as an embedded cluster: Ray's processes ask the kernel to end them with the
    thread that started them. Raises `ClusterError`.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    opened = _start_embedded(options, log_dir) if options.address is None else _join(options, options.address, log_dir)
    opened.start_s = time.monotonic() - begin
    return opened


def usable_cores() -> list[int]:
    """The cores this process may run on."""
    return sorted(os.sched_getaffinity(0))


@functools.cache
def _process_token() -> str:
    """The secret of this process's embedded clusters; Ray reads it once a process and keeps it."""
    return secrets.token_hex(32)


def _start_embedded(options: ClusterOptions, log_dir: Path) -> Cluster:
    cores = len(usable_cores())
    num_cpus = options.num_cpus or cores
    if num_cpus > cores:
        raise ClusterError(
            f"cpus: got {num_cpus}, but this process may use {cores}",
            hint=f"ask for at most {cores}, or join a cluster with --address",
        )
    worker_env = {"GLIBC_TUNABLES": options.malloc_tunables} if options.malloc_tunables else {}
    cluster = Cluster(embedded=True, address="local", options=options, worker_env=worker_env, start_s=0.0)
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(_temporary_folder())
        environment = {
            **worker_env,
            keeper.MARK: str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": _process_token(),
            # Unofficial, but the one switch that binds every socket to the loopback address; checked below.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_worker_niceness": "0",
            "RAY_ADDRESS": None,
            "RAY_AUTH_TOKEN_PATH": None,
        }
        undo.callback(_save_worker_logs, folder, log_dir)
        undo.enter_context(
            _ray_connection(
                {
                    "address": "local",
                    "num_cpus": num_cpus,
                    "include_dashboard": False,
                    "object_store_memory": options.object_store_bytes,
                    "_temp_dir": str(folder),
                },
                environment,
                log_dir,
            )
        )
        for node in cluster.nodes():
            if not node.ip.startswith("127."):
                raise ClusterError(
                    f"embedded Ray listens on {node.ip}, expected the loopback address",
                    hint="this Ray version is not the tested one; install the versions of constraints.txt",
                )
        cluster._closing = undo.pop_all()
    return cluster


def _join(options: ClusterOptions, address: str, log_dir: Path) -> Cluster:
    host, port = resolve_address(address)
    probe_address(host, port)
    worker_env = {"GLIBC_TUNABLES": options.malloc_tunables} if options.malloc_tunables else {}
    cluster = Cluster(embedded=False, address=f"{host}:{port}", options=options, worker_env=worker_env, start_s=0.0)
    has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if not has_token:
        log.warning(
            "the cluster at %s is joined without a token: whoever reaches its ports can run code on it", cluster.address
        )
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # An explicit address never turns token authentication on by itself.
        "RAY_AUTH_MODE": "token" if has_token else os.environ.get("RAY_AUTH_MODE"),
        # Pickles and bytecode agree between patch levels of one Python minor version.
        "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL": "minor",
        # Without these an address that does not answer is tried for 14 minutes.
        "RAY_NUM_REDIS_GET_RETRIES": "1",
        "RAY_gcs_rpc_server_connect_timeout_s": "1",
        "RAY_py_gcs_connect_timeout_s": "5",
        "RAY_ADDRESS": None,
    }
    runtime_env = {"py_modules": [str(PACKAGE)], "excludes": ["__pycache__"], "env_vars": worker_env}
    with contextlib.ExitStack() as undo:
        undo.enter_context(
            _ray_connection({"address": cluster.address, "runtime_env": runtime_env}, environment, log_dir)
        )
        cluster._closing = undo.pop_all()
    return cluster


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A short private folder for Ray; a keeper process removes it, and what still runs in it, when the driver ends."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) + len(keeper.PREFIX) + 9 > MAX_TEMP_DIR_BYTES:
        log.warning("the temp folder %s is too long a path for Ray's sockets; /tmp is used", base)
        base = Path("/tmp")
    keeper.sweep_stale(base)
    try:
        folder, lock = keeper.make_folder(base)
    except OSError as error:
        raise ClusterError(
            f"temp folder {base}: cannot be written ({error.strerror})", hint="set TMPDIR to a short path that can"
        ) from error
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", keeper.__file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    try:
        yield folder
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            log.warning("processes of Ray in %s have not ended; its keeper (process %d) goes on", folder, process.pid)
        os.close(lock)


@contextlib.contextmanager
def _ray_connection(arguments: dict[str, Any], environment: Mapping[str, str | None], log_dir: Path) -> Iterator[None]:
    """Connected to Ray, with stdout, the signal handlers and the environment as they were."""
    with _quiet(log_dir / "ray.log") as said, _environment(environment), _own_signal_handlers():
        import ray
        import ray._private.worker

        if ray.is_initialized():
            raise ClusterError(
                "this process is connected to a Ray cluster already", hint="one cluster a process at a time"
            )
        # Ray prints failures of its raylets to stdout even with log_to_driver=False.
        setattr(ray._private.worker, "print_worker_logs", _log_instead_of_printing)  # noqa: B010 (mypy: it has another type)
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
            with contextlib.suppress(Exception):
                ray.shutdown()
            raise _explain(error, arguments, said.read_text(errors="replace")) from error
    try:
        yield
    finally:
        with _quiet(log_dir / "ray.log"), _own_signal_handlers():
            ray.shutdown()


def _explain(error: Exception, arguments: Mapping[str, Any], said: str) -> ClusterError:
    """Ray's failure to connect in one line; some of its reasons stand only in what it wrote to stderr."""
    where = arguments["address"]
    everything = f"{error}\n{said}"
    if "ersion mismatch" in everything:
        reason = " ".join(str(error).split())
        return ClusterError(
            f"cluster {where}: its versions are not ours: {reason}",
            hint="install the same Ray and Python minor version on the cluster and here",
        )
    if "nauthenticated" in everything or "UNAUTHENTICATED" in everything or "token" in str(error).lower():
        return ClusterError(
            f"cluster {where}: it does not accept the token",
            hint="set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token",
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if where == "local":
        return ClusterError(
            f"embedded Ray does not start: {first}", hint="logs/ray.log in the run folder has what Ray said"
        )
    return ClusterError(
        f"cluster {where}: cannot connect: {first}", hint="check the address with 'ray status --address HOST:PORT'"
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
def _own_signal_handlers() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM; this puts ours back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _save_worker_logs(folder: Path, log_dir: Path) -> None:
    """Keep what the workers printed: Ray's log folder goes with the cluster."""
    for path in folder.glob("session_2*/logs/worker-*"):
        with contextlib.suppress(OSError):
            if path.stat().st_size:
                shutil.copy(path, log_dir / path.name)
