"""The embedded Ray: what it opens, says, changes and leaves behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ryot.cluster.options import MALLOC_TUNABLES, ClusterOptions
from ryot.cluster.runtime import Cluster, EmbeddedCluster, open_cluster
from ryot.errors import ClusterError
from tests.cluster.conftest import cluster_folders, processes_of


def test_every_socket_listens_on_the_loopback_address_alone(cluster: EmbeddedCluster) -> None:
    listening = [
        (process.name(), connection.laddr.ip)
        for process in [*processes_of(cluster.folder), psutil.Process()]
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_no_dashboard_answers_and_no_usage_is_reported(cluster: EmbeddedCluster) -> None:
    import ray

    assert ray._private.worker._global_node.webui_url in (None, "")
    environment = processes_of(cluster.folder)[0].environ()
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_the_token_is_fresh_secret_and_demanded(cluster: EmbeddedCluster) -> None:
    token = processes_of(cluster.folder)[0].environ()["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    assert cluster.folder.stat().st_mode & 0o077 == 0
    assert not any(token in p.read_text(errors="replace") for p in cluster.folder.rglob("*.log") if p.is_file())
    # The check itself is Ray's: `test_joining.py` is refused by a real one with a wrong token.
    assert processes_of(cluster.folder)[0].environ()["RAY_AUTH_MODE"] == "token"


def test_our_process_is_as_it_was(cluster: EmbeddedCluster) -> None:
    assert not [name for name in os.environ if name.startswith(("RAY_AUTH", "RYOT_CLUSTER", "RAY_ENABLE", "GLIBC"))]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_workers_run_at_normal_priority_with_our_malloc_settings_and_threads(cluster: EmbeddedCluster) -> None:
    import ray

    @ray.remote(num_cpus=1)
    def look() -> tuple[Any, ...]:
        return os.nice(0), os.environ["GLIBC_TUNABLES"], os.environ["OMP_NUM_THREADS"]

    assert ray.get(look.remote()) == (os.nice(0), MALLOC_TUNABLES, "1")
    assert cluster.worker_env == {"GLIBC_TUNABLES": MALLOC_TUNABLES}


def test_what_ray_says_of_a_dying_worker_does_not_reach_stdout(
    cluster: EmbeddedCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray
    from ray.exceptions import WorkerCrashedError

    @ray.remote(max_retries=0)
    def die() -> None:
        sys.stdout.write("a worker's own words")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerCrashedError):
        ray.get(die.remote())
    assert capfd.readouterr().out == ""


def test_a_second_cluster_in_one_process_is_refused(cluster: Cluster, tmp_path: Path, temporary: Path) -> None:
    with pytest.raises(ClusterError, match="connected to a Ray cluster already"):
        open_cluster(ClusterOptions(), log_dir=tmp_path)
    assert cluster_folders() == set()


def test_more_cores_than_there_are_are_refused(tmp_path: Path) -> None:
    have = len(os.sched_getaffinity(0))
    with pytest.raises(ClusterError, match=f"cpus: got {have + 1}, but this process may use {have}"):
        open_cluster(ClusterOptions(num_cpus=have + 1), log_dir=tmp_path)


def test_a_cluster_that_lost_its_control_process_is_known_and_can_be_restarted(cluster: EmbeddedCluster) -> None:
    assert cluster.is_whole()
    first = cluster.folder
    token = processes_of(first)[0].environ()["RAY_AUTH_TOKEN"]
    next(p for p in processes_of(first) if p.name() == "gcs_server").kill()
    deadline = time.monotonic() + 60
    while cluster.is_whole():
        assert time.monotonic() < deadline
    cluster.restart()
    assert cluster.is_whole()
    assert processes_of(cluster.folder)[0].environ()["RAY_AUTH_TOKEN"] != token
    assert cluster.nodes()[0].cpus == len(os.sched_getaffinity(0))
    assert not first.exists()
    assert processes_of(first) == []


def test_shutting_down_leaves_no_process_and_no_folder_even_when_ctrl_c_comes_meanwhile(
    cluster: EmbeddedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last test of this module: it ends the module's cluster.
    import ray

    folder, shutdown = cluster.folder, ray.shutdown
    assert processes_of(folder)
    # Only with a handler does a SIGTERM that comes now not end the process at once.
    caught: list[bool] = []

    def watch(ended: threading.Event) -> None:
        while not ended.wait(0.005):
            caught.append(bool(_caught_signals() >> (signal.SIGTERM - 1) & 1))

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        ended = threading.Event()
        watcher = threading.Thread(target=watch, args=(ended,))
        watcher.start()
        shutdown()
        ended.set()
        watcher.join()

    monkeypatch.setattr(ray, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cluster.shutdown()
    assert not ray.is_initialized()
    assert processes_of(folder) == []
    assert not folder.exists()
    # The core is gone after some hundredths of a second of one.
    assert len(caught) > 20 and caught.count(False) <= 2
    cluster.shutdown()


def _caught_signals() -> int:
    """The mask of the signals that this process has handlers for (proc(5))."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
