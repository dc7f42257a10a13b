"""Nothing that runs here reports home: seen in the files of an empty home and in the calls to the system."""

from __future__ import annotations

import functools
import getpass
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA

from ryot.edge.bundle import load_bundle
from ryot.edge.telemetry import Sender, count_metric
from ryot.errors import ConfigError
from tests.otlp import Receiver, read_metrics

REPOSITORY = Path(__file__).parents[2]
GENERATE = """
import sys
from pathlib import Path
from ryot.edge.cli import run
sys.exit(run(Path(sys.argv[1]), ["--prompt", "def ", "--max-new-tokens", "3", "--engine", sys.argv[2]]))
"""
EXPORT = """
import sys
from pathlib import Path
import numpy as np
from ryot.deploy.standard import StandardGraph
print(StandardGraph(Path(sys.argv[1]) / "model.onnx").run(np.array([[1, 2]]))[0].shape)
"""
MEASURE = """
import sys
from ryot.edge.bundle import load_bundle
from ryot.edge.measure import build_spec, measure_once
spec = build_spec(load_bundle(sys.argv[1]), engine=sys.argv[2], min_runs=1, min_time_s=0.0)
print(measure_once(spec).ok)
"""


SERVE = """
import http.client, json, os, signal, sys, threading
from pathlib import Path
from ryot.serve.model import ModelOptions
from ryot.serve.server import ServerOptions, run_server

def ask(port):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    client.request("POST", "/v1/completions", json.dumps({"model": "tiny-0", "prompt": "def ", "max_tokens": 3}))
    print(client.getresponse().status)
    os.kill(os.getpid(), signal.SIGTERM)

def ready(address, models):
    threading.Thread(target=ask, args=[int(address.rsplit(":", 1)[1])]).start()

run_server([Path(sys.argv[1])], ModelOptions(rows=2), ServerOptions(port=0), ready)
"""


def run_bare(
    program: str, *arguments: str | Path, home: Path, before: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """A Python with an empty home, and an environment in which nobody has switched anything off."""
    home.mkdir(exist_ok=True)
    environment |= {"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [*before, sys.executable, "-B", "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)


@functools.cache
def find_tracer() -> str | None:
    """The path of strace where processes may be traced."""
    strace = shutil.which("strace")
    if strace and subprocess.run([strace, "true"], capture_output=True, check=False).returncode == 0:
        return strace
    return None


def trace_calls(calls: Path) -> tuple[str, ...]:
    """The command that writes down a program's calls about files and networks; skips where that isn't possible."""
    strace = find_tracer()
    if strace is None:
        pytest.skip("strace isn't installed, or processes may not be traced here")
    return (strace, "-f", "--seccomp-bpf", "-o", str(calls), "-e", "trace=%network,%file")


@pytest.mark.parametrize(
    ("program", "engine"),
    [(GENERATE, "capi"), (GENERATE, "python"), (MEASURE, "capi"), (MEASURE, "python"), (EXPORT, ""), (SERVE, "")],
    ids=["generate capi", "generate python", "measure capi", "measure python", "graph beside torch", "serve"],
)
def test_a_process_that_loads_onnxruntime_reaches_nobody_and_writes_no_file(
    llama_path: Path, tmp_path: Path, program: str, engine: str
) -> None:
    calls, home = tmp_path / "calls", tmp_path / "home"
    traced = trace_calls(calls) if find_tracer() else ()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run = run_bare(program, llama_path, engine, home=home, before=traced, TMPDIR=str(scratch))
    assert (run.returncode, "Traceback" in run.stderr) == (0, False), run.stderr
    assert not [*home.iterdir(), *scratch.iterdir()]
    if not traced:
        return
    lines = calls.read_text(errors="replace").splitlines()
    assert any("libonnxruntime" in line or "onnxruntime_pybind11_state" in line for line in lines)
    told = [line for line in lines if re.search(r"\b(socket|connect|sendto|sendmsg)\(", line)]
    if program is SERVE:  # it listens where it was told to, and what it is asked comes from this machine
        told = [line for line in told if "connect(" in line and 'inet_addr("127.0.0.1")' not in line]
    assert not told
    writing = r"O_WRONLY|O_RDWR|O_CREAT|\b(mkdir|rename|unlink|link|symlink|truncate|chmod)(at|at2)?\("
    allowed = rf'"(/dev/|/proc/|{re.escape(str(scratch))}[/"])'
    assert not [line for line in lines if re.search(writing, line) and not re.search(allowed, line)]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


METER = """
import sys
from pathlib import Path
from ryot.edge.cli import run
sys.exit(run(Path(sys.argv[1]), ["--prompt", "def secret", "--max-new-tokens", "3", "--metrics-to", sys.argv[2]]))
"""


def test_an_owner_who_names_an_address_gets_numbers_there_and_nowhere_else(
    llama_path: Path, tmp_path: Path, receiver: Receiver
) -> None:
    calls = tmp_path / "calls"
    proxied = {"http_proxy": "http://127.0.0.1:9"}  # goes nowhere, and must not be asked
    run = run_bare(METER, llama_path, receiver.address, home=tmp_path / "home", before=trace_calls(calls), **proxied)
    assert (run.returncode, run.stderr) == (0, "")
    connected = re.findall(r"connect\(.*?sin_port=htons\((\d+)\)", calls.read_text(errors="replace"))
    assert connected == [str(receiver.port)]
    [(path, body)] = receiver.received
    assert path == "/v1/metrics"
    found = read_metrics(body)
    assert found["ryot.requests"].sum.data_points[0].as_int == 1 and found["ryot.requests"].sum.is_monotonic
    assert found["ryot.tokens.generated"].sum.data_points[0].as_int == 3
    first = found["gen_ai.server.time_to_first_token"].histogram
    assert first.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA
    assert (first.data_points[0].count, sum(first.data_points[0].bucket_counts)) == (1, 1)
    assert len(first.data_points[0].bucket_counts) == len(first.data_points[0].explicit_bounds) + 1
    assert 0 < first.data_points[0].sum <= found["gen_ai.server.request.duration"].histogram.data_points[0].sum < 60
    said = body.decode()
    for text in ("secret", load_bundle(llama_path).name, socket.gethostname(), getpass.getuser(), str(llama_path)):
        assert text not in said


def test_a_receiver_that_is_down_is_said_and_made_up_for(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    counts = {1: 2, 2: 5}
    sender = Sender(
        f"{receiver.address}/own?key=1",
        lambda: {source: [count_metric("n", "1", count)] for source, count in counts.items()},
        every_s=1000,
    )
    receiver.status = 503
    sender.send()
    sender.send()
    assert [record.message for record in caplog.records] == [
        f"{receiver.address}/own?key=1: takes no telemetry (it answered 503 Service Unavailable)"
    ]
    receiver.status = 200
    sender.send()
    counts[1] = 4
    del counts[2]  # a model that is served no more
    sender.close()
    assert [path for path, _ in receiver.received] == ["/own?key=1"] * 2
    assert [read_metrics(body)["n"].sum.data_points[0].as_int for _, body in receiver.received] == [7, 2]
    for address in ("collector", "ftp://a", "http://", "http://u:p@host", "http://a:b"):
        with pytest.raises(ConfigError, match="--metrics-to: got"):
            Sender(address, dict)


def test_what_the_user_has_set_wins(tmp_path: Path) -> None:
    program = "import os, ryot; print(*(os.environ[name] for name in ryot.TELEMETRY_SWITCHES))"
    assert run_bare(program, home=tmp_path / "home").stdout == "1 1 0\n"
    own = {"ORT_DISABLE_TELEMETRY": "0", "HF_HUB_DISABLE_TELEMETRY": "no", "RAY_USAGE_STATS_ENABLED": "1"}
    assert run_bare(program, home=tmp_path / "home", **own).stdout == "0 no 1\n"
