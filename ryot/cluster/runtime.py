"""Ray for one run: an embedded cluster that leaves nothing behind, or a cluster that exists already.

    with open_cluster(ClusterOptions(), log_dir=folder.logs) as cluster:
        ...

Ray is imported only here and in the modules of this package that run after this one, because much of it reads its
environment at import. The traps that the settings below avoid were found with Ray 2.60; `tests/cluster` tests each.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ryot import scratch
from ryot.cluster import reaper
from ryot.cluster.address import probe_address, resolve_address
from ryot.cluster.connection import ray_connection
from ryot.cluster.options import ClusterOptions
from ryot.errors import ClusterError
from ryot.run.signals import hold_signals

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]

#: Sockets below the temp folder have a path of at most 107 bytes, of which Ray needs 67.
MAX_TEMP_DIR_BYTES = 40

#: A joined cluster whose head has been silent for so long is given up; Ray aborts the process after 60 s.
HEAD_LOST_S = 25.0
#: How often it is asked at most.
_ASK_EVERY_S = 5.0


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

    @property
    def name(self) -> str:
        """What messages call it: containers and namespaces may share a host name."""
        return self.hostname if self.ip.startswith("127.") else f"{self.hostname} ({self.ip})"


class Cluster:
    """A connection to Ray, opened when it is needed: `EmbeddedCluster` or `JoinedCluster`, made by `build_cluster`."""

    embedded: ClassVar[bool]

    def __init__(self, options: ClusterOptions, log_dir: Path):
        self.options = options
        self.log_dir = log_dir
        self.worker_env = {"GLIBC_TUNABLES": options.malloc_tunables} if options.malloc_tunables else {}
        """What the workers have in their environment because of us."""
        self.address = "local"
        self.is_open = False
        self.start_s = 0.0
        """Time from nothing to connected, importing Ray included; 0 for a cluster that was never needed."""
        self.shutdown_s = 0.0
        self.restarts = 0
        self._closing = contextlib.ExitStack()

    def open(self) -> None:
        """Connect; does nothing when connected. Raises `ClusterError`."""
        if self.is_open:
            return
        self.log_dir.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        with contextlib.ExitStack() as undo:
            self._open(undo)
            self._closing = undo.pop_all()
        self.is_open = True
        self.start_s = time.monotonic() - begin

    def _open(self, undo: contextlib.ExitStack) -> None:
        raise NotImplementedError

    def is_whole(self) -> bool:
        """Whether what Ray needs to work at all is there."""
        raise NotImplementedError

    def restart(self) -> None:
        """Make a cluster that is not whole whole again. Raises `ClusterError` when that is not ours to do."""
        raise NotImplementedError

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

    def shutdown(self) -> None:
        """Disconnect; an embedded cluster ends with all its processes and files. Does nothing the second time.

        A signal that comes meanwhile is heeded afterwards: Ray, cut short, would start to shut down again at the end
        of the process, in a folder that is gone.
        """
        begin = time.monotonic()
        self.is_open = False
        closing, self._closing = self._closing, contextlib.ExitStack()
        with hold_signals():
            closing.close()
        self.shutdown_s += time.monotonic() - begin

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()


class EmbeddedCluster(Cluster):
    """Ray on this machine for this process alone: loopback, a secret token, no dashboard, no usage statistics."""

    embedded = True

    def _open(self, undo: contextlib.ExitStack) -> None:
        cores = len(usable_cores())
        num_cpus = self.options.num_cpus or cores
        if num_cpus > cores:
            raise ClusterError(
                f"cpus: got {num_cpus}, but this process may use {cores}",
                hint=f"ask for at most {cores}, or join a cluster with --address",
            )
        self.folder = undo.enter_context(_temporary_folder())
        environment = {
            **self.worker_env,
            reaper.MARK: str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Unofficial, but the one switch that binds every socket to the loopback address; checked below.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_worker_niceness": "0",
            "RAY_ADDRESS": None,
            "RAY_AUTH_TOKEN_PATH": None,
        }
        arguments = {
            "address": "local",
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": self.options.object_store_bytes,
            # Ray opens its folder to all users of the machine; in ours they do not reach it.
            "_temp_dir": str(self.folder / "r"),
        }
        undo.callback(_save_worker_logs, self.folder, self.log_dir)
        undo.enter_context(ray_connection(arguments, environment, self.log_dir))
        for node in self.nodes():
            if not node.ip.startswith("127."):
                raise ClusterError(
                    f"embedded Ray listens on {node.ip}, expected the loopback address",
                    hint="this Ray version is not the tested one; install the versions of constraints.txt",
                )
        self._vital = reaper.find_marked(self.folder, programs=("gcs_server", "raylet"))

    def is_whole(self) -> bool:
        """Whether Ray's control process and its node manager live; without them a driver hangs, or is aborted later."""
        return all(reaper.is_running(pid) for pid in self._vital)

    def restart(self) -> None:
        """End what is left and start afresh; every actor is gone."""
        self.shutdown()
        self.open()
        self.restarts += 1


class JoinedCluster(Cluster):
    """A cluster that someone else runs; the package goes to its workers with the job."""

    embedded = False

    def _open(self, undo: contextlib.ExitStack) -> None:
        assert self.options.address is not None
        self._host, self._port = resolve_address(self.options.address)
        self.address = f"{self._host}:{self._port}"
        self._answered_at = self._tried_at = time.monotonic()
        probe_address(self._host, self._port)
        has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
        if not has_token:
            log.warning("cluster %s is joined without a token: whoever reaches its ports runs code on it", self.address)
        environment = {
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
        runtime_env = {"py_modules": [str(PACKAGE)], "excludes": ["__pycache__"], "env_vars": self.worker_env}
        arguments = {"address": self.address, "runtime_env": runtime_env}
        undo.enter_context(ray_connection(arguments, environment, self.log_dir))

    def is_whole(self) -> bool:
        """Whether the head has answered within the last `HEAD_LOST_S` seconds; which is asked now and then."""
        now = time.monotonic()
        if now - self._tried_at >= _ASK_EVERY_S:
            self._tried_at = now
            try:
                probe_address(self._host, self._port)
                self._answered_at = time.monotonic()
            except ClusterError as error:
                log.warning("%s", error)
        return now - self._answered_at < HEAD_LOST_S

    def restart(self) -> None:
        """Raise `ClusterError`: its head is not ours to start. Ray would abort this process after a minute."""
        # Said at once: Ray may end this process, with code 1, while it is asked to part from a head that is gone.
        log.error("cluster %s: its head has not answered for %g s; the run ends here", self.address, HEAD_LOST_S)
        raise ClusterError(f"cluster {self.address}: lost", hint="resume the run when the cluster is well again")


def build_cluster(options: ClusterOptions, *, log_dir: Path) -> Cluster:
    """The cluster that `options` ask for, not yet started or joined; what Ray says goes to files in `log_dir`."""
    return EmbeddedCluster(options, log_dir) if options.address is None else JoinedCluster(options, log_dir)


def open_cluster(options: ClusterOptions, *, log_dir: Path) -> Cluster:
    """The same, started or joined.

    The calling thread must live as long as an embedded cluster: Ray's processes ask the kernel to end them with the
    thread that started them. Raises `ClusterError`.
    """
    cluster = build_cluster(options, log_dir=log_dir)
    cluster.open()
    return cluster


def usable_cores() -> list[int]:
    """The cores this process may run on."""
    return sorted(os.sched_getaffinity(0))


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A short private folder for Ray; a reaper process removes it, and what still runs in it, when the driver ends."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) + len(reaper.PREFIX) + 11 > MAX_TEMP_DIR_BYTES:
        log.warning("the temp folder %s is too long a path for Ray's sockets; /tmp is used", base)
        base = Path("/tmp")
    scratch.sweep_stale(base, reaper.PREFIX, remove=reaper.remove_cluster)
    try:
        folder, lock = scratch.make_folder(base, reaper.PREFIX)
    except OSError as error:
        raise ClusterError(
            f"temp folder {base}: cannot be written ({error.strerror})", hint="set TMPDIR to a short path that can"
        ) from error
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, str(folder)],
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
            log.warning("processes of Ray in %s have not ended; its reaper (process %d) goes on", folder, process.pid)
        os.close(lock)


def _save_worker_logs(folder: Path, log_dir: Path) -> None:
    """Keep what the workers printed: Ray's log folder goes with the cluster."""
    for path in folder.glob("r/session_2*/logs/worker-*"):
        with contextlib.suppress(OSError):
            if path.stat().st_size:
                shutil.copy(path, log_dir / path.name)
