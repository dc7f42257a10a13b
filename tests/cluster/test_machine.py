"""What touches the machine: cores, the reaper process, addresses, signals. No Ray."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from ryot import scratch
from ryot.cluster import reaper
from ryot.cluster.address import probe_address, resolve_address
from ryot.cluster.cores import CoreClaim
from ryot.cluster.folders import pack_folder, unpack_folder
from ryot.cluster.options import ClusterOptions
from ryot.cluster.runtime import open_cluster
from ryot.errors import ClusterError, ConfigError

CLAIM = """
import sys, threading
from ryot.cluster import cores
from ryot.cluster.cores import CoreClaim, pin_process
cores.NAME = sys.argv[1]
waiting = threading.Event()
threads = [threading.Thread(target=waiting.wait, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
claim = CoreClaim(1, timeout_s=0.2)
if claim.cores:
    pin_process(claim.cores)
print(*claim.cores, flush=True)
input()
"""


def test_workers_get_different_cores_with_all_their_threads_and_a_dead_one_frees_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Runs of this moment, another test's too, hold cores under the name that they share.
    name = f"ryot-test-{os.getpid()}/core/{{}}"
    monkeypatch.setattr("ryot.cluster.cores.NAME", name)
    cores = sorted(os.sched_getaffinity(0))
    holders = [subprocess.Popen([sys.executable, "-c", CLAIM, name], stdin=-1, stdout=-1, text=True) for _ in cores]
    try:
        claimed = []
        for holder in holders:
            assert holder.stdout is not None
            claimed.append(int(holder.stdout.readline()))
            for task in Path(f"/proc/{holder.pid}/task").iterdir():
                assert os.sched_getaffinity(int(task.name)) == {claimed[-1]}
        assert sorted(claimed) == cores
        assert CoreClaim(1, timeout_s=0).cores == []
        holders[0].kill()
        holders[0].wait()
        freed = CoreClaim(1, timeout_s=2)
        assert freed.cores == claimed[:1]
        freed.release()
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def test_the_reaper_ends_the_processes_and_removes_the_folder_of_a_killed_driver() -> None:
    base = Path(tempfile.mkdtemp(prefix="ryot-test-", dir="/tmp"))
    # A driver that does what runtime.py does, with a plain process in the place of Ray's.
    program = f"""
import subprocess, sys, time
from pathlib import Path
from ryot.cluster import runtime, reaper
runtime.tempfile.tempdir = {str(base)!r}
with runtime._temporary_folder() as folder:
    child = subprocess.Popen(["sleep", "60"], env={{reaper.MARK: str(folder)}}, start_new_session=True)
    print(folder, child.pid, flush=True)
    time.sleep(60)
"""
    driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    name, child = driver.stdout.readline().split()
    assert Path(name).exists()
    deadline = time.monotonic() + 60
    while reaper.find_marked(Path(name)) != [int(child)]:  # its environment reads empty while it is being started
        assert time.monotonic() < deadline
    assert scratch.sweep_stale(base, reaper.PREFIX, min_age_s=0) == []
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    gone = psutil.wait_procs([psutil.Process(int(child))] if psutil.pid_exists(int(child)) else [], timeout=10)[1] == []
    assert gone
    deadline = time.monotonic() + 60
    while Path(name).exists():
        assert time.monotonic() < deadline
    base.rmdir()


def test_a_folder_whose_driver_and_reaper_are_dead_is_swept_and_a_living_ones_stays(tmp_path: Path) -> None:
    dead, lock = scratch.make_folder(tmp_path, reaper.PREFIX)
    os.close(lock)
    alive, lock = scratch.make_folder(tmp_path, reaper.PREFIX)
    (tmp_path / f"{reaper.PREFIX}not-ours").mkdir()
    left_over = subprocess.Popen(["sleep", "60"], env={reaper.MARK: str(dead)})
    assert scratch.sweep_stale(tmp_path, reaper.PREFIX, remove=reaper.remove_cluster, min_age_s=0) == [dead]
    assert left_over.wait(timeout=5) == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, f"{reaper.PREFIX}not-ours"])
    os.close(lock)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "a Ray Client address, expected HOST:PORT"),
        ("head", "expected HOST:PORT or auto"),
        ("head:port", "expected HOST:PORT or auto"),
        ("head:70000", "expected HOST:PORT or auto"),
    ],
)
def test_what_is_no_address_is_refused(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_address(address)


def test_auto_is_ray_address_when_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve_address("auto") == ("10.0.0.1", 6379)


def test_an_address_that_ray_address_gave_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ClusterError, match=rf"cluster 127.0.0.1:{port} \(RAY_ADDRESS\): cannot connect") as error:
        probe_address(*resolve_address("auto"))
    assert "unset it" in str(error.value.hint)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match="RAY_ADDRESS: got 'ray://head:10001'"):
        resolve_address("auto")


def test_a_host_name_is_tried_at_each_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.2", "127.0.0.1")]
        look_up = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *a, **k: answers if host == "head" else look_up(host, *a, **k)
        )
        with pytest.raises(ClusterError, match=f"cluster head:{port}: what answers there is no Ray head"):
            probe_address("head", port)
        server.shutdown()


def test_a_name_server_that_does_not_answer_is_given_up_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()
    monkeypatch.setattr("ryot.cluster.address.PROBE_S", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [silent.wait(60)][1:])
    begin = time.monotonic()
    with pytest.raises(ClusterError, match=r"cluster head:6379: no answer within 0\.5 s"):
        probe_address("head", 6379)
    assert time.monotonic() - begin < 10
    silent.set()


def test_a_run_names_a_stale_ray_address_before_any_other_work(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and says nothing
        address = f"127.0.0.1:{server.getsockname()[1]}"
        run = [sys.executable, "-c", "from ryot.cli.main import run; run()", "cluster-run", "-o", str(tmp_path / "run")]
        done = subprocess.run(run, env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: cluster {address} (RAY_ADDRESS): no answer within 3 s\nhint: ")
    assert not (tmp_path / "run").exists()


def test_a_dead_port_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClusterError, match=f"127.0.0.1:{port}: cannot connect"):
        probe_address("127.0.0.1", port)


def test_a_silent_port_is_given_up_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryot.cluster.address.PROBE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        begin = time.monotonic()
        with pytest.raises(ClusterError, match=r"no answer within 0\.5 s"):
            probe_address("127.0.0.1", server.getsockname()[1])
    # One connect, which succeeds, and one read.
    assert time.monotonic() - begin < 10


def test_a_port_that_speaks_something_else_is_no_ray_head() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterError, match="what answers there is no Ray head"):
            probe_address("127.0.0.1", server.server_address[1])
        server.shutdown()


def test_a_ray_that_is_too_slow_to_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray says it after 30 s on a busy machine

    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(ClusterError, match="embedded Ray does not start: The current node timed out during startup"):
        open_cluster(ClusterOptions(), log_dir=tmp_path)


def test_a_folder_travels_as_bytes_and_a_hostile_one_stays_inside(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "training").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"\0\1\2")
    (source / "training/b").write_text("b")
    unpack_folder(pack_folder(source), tmp_path / "copy")
    assert (tmp_path / "copy/a.bin").read_bytes() == b"\0\1\2"
    assert (tmp_path / "copy/training/b").read_text() == "b"
    (source / "link").symlink_to("/etc/passwd")
    with pytest.raises(ClusterError, match="link"):
        unpack_folder(pack_folder(source), tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "source"]


def test_the_first_signal_asks_the_second_insists_and_the_third_ends(tmp_path: Path) -> None:
    program = """
import os, signal
from ryot.run.signals import StopSignals
with StopSignals() as signals:
    assert not signals.stop
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.stop and not signals.stop_at_once
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.stop_at_once
    print("twice", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "twice\n")
    assert "stopping after the chunk in flight" in done.stderr


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    # As under `nohup ... &`: Ctrl-C and the terminal's end are for others, SIGTERM is not.
    program = """
import os, signal
from ryot.run.signals import StopSignals, hold_signals, interrupt_on_signals
interrupt_on_signals()
with StopSignals() as signals, hold_signals():
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    assert not signals.stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.stop
print("goes on", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    ignoring = ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", sys.executable, "-c", program]
    done = subprocess.run(ignoring, capture_output=True, text=True)
    assert done.stdout == "goes on\n"
    assert done.stderr.strip().endswith("KeyboardInterrupt")


def test_an_export_that_a_second_ctrl_c_gave_up_does_not_hold_or_abort_the_end_of_the_process() -> None:
    program = """
import atexit, time
from ryot.cli.main import _end
from ryot.cluster.callbacks import CallbackThread
atexit.register(print, "Python's own end", flush=True)
thread = CallbackThread(time.sleep)
thread.put({seconds})
thread.leave(lambda: {given_up})
_end(130)
"""
    for seconds, given_up, said in ((0, False, "Python's own end\n"), (60, True, "")):
        code = program.format(seconds=seconds, given_up=given_up)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (130, said)
