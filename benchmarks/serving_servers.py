"""The servers that `serving.py` compares: each is a process, pinned to its cores, that listens on a port."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

RYOT = [sys.executable, "-c", "from ryot.cli.main import run; run()"]
READY_TIMEOUT_S = 120.0
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
TICKS = os.sysconf("SC_CLK_TCK")


class Served(NamedTuple):
    """A server that is ready."""

    port: int
    pid: int
    ready_s: float
    """From the start of its process until it answered that it is ready."""

    def cpu_s(self) -> float:
        """CPU time that its process has taken so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_bytes(self) -> int:
        """Memory that it holds now."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text


@contextlib.contextmanager
def serve_ryot(
    bundle: str, cores: Sequence[int], *, rows: int, log: Path, more: Sequence[str] = ()
) -> Iterator[Served]:
    """`ryot-deploy serve` with a thread per core."""
    port = free_port()
    command = [*RYOT, "serve", bundle, "--port", str(port), "--threads", str(len(cores)), "--rows", str(rows)]
    with _running([*command, "--no-access-log", *more], cores, port, "/ready", log, {}) as served:
        yield served


@contextlib.contextmanager
def serve_llama(
    program: Path, model: str, cores: Sequence[int], *, rows: int, context: int, log: Path
) -> Iterator[Served]:
    """llama-server with as many slots; its context is shared by them."""
    port = free_port()
    command = [str(program), "-m", model, "--host", "127.0.0.1", "--port", str(port), "-t", str(len(cores))]
    command += ["-tb", str(len(cores)), "-np", str(rows), "-c", str(context * rows), "--no-webui"]
    environment = {"LD_LIBRARY_PATH": str(program.parent)}
    with _running(command, cores, port, "/health", log, environment) as served:
        yield served


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(
    command: Sequence[str], cores: Sequence[int], port: int, path: str, log: Path, environment: dict[str, str]
) -> Iterator[Served]:
    began_s = time.perf_counter()
    pinned = ["taskset", "-c", ",".join(map(str, cores)), *command]
    with log.open("ab") as out:
        process = subprocess.Popen(
            pinned, stdout=out, stderr=out, env=os.environ | ONE_THREAD | environment, start_new_session=True
        )
    try:
        served = Served(port, process.pid, _wait_until_ready(process, port, path, began_s, log))
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, path: str, began_s: float, log: Path) -> float:
    while process.poll() is None and time.perf_counter() - began_s < READY_TIMEOUT_S:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            ready = connection.getresponse().status == 200
            connection.close()
            if ready:
                return time.perf_counter() - began_s
        except OSError:
            pass
        time.sleep(0.005)
    raise SystemExit(f"{command_name(process)} is not ready, see {log}")


def command_name(process: subprocess.Popen[bytes]) -> str:
    assert isinstance(process.args, list)
    return Path(str(process.args[3])).name
