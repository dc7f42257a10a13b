"""Joining a cluster that runs already: a real `ray start` on the loopback address, with a token."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ryot.cluster import reaper
from ryot.cluster.address import probe_address
from ryot.cluster.probe import NodeFacts, check_facts
from ryot.errors import EXIT_FAILED, EXIT_USAGE, ClusterError
from ryot.train.dataset import Dataset
from tests.cluster.conftest import learned, learned_alone, plan_both
from tests.edge.tiny_bundle import write_bundle
from tests.run.tiny import QUICK, tiny_recipes

TOKEN = "5a" * 32
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Folder of the head: its log, what marks its processes, and their temporary files."""
    with tempfile.TemporaryDirectory(prefix="ryot-head-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def head(folder: Path) -> Iterator[str]:
    """Address of a Ray head of two CPUs, labelled `measure`, that demands `TOKEN`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        *(
            f"--port={port}",
            "--num-cpus=2",
            '--resources={"measure": 1}',
            "--include-dashboard=false",
            "--object-store-memory=80000000",
        ),
        *(f"--temp-dir={folder / 'r'}", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"),
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "TMPDIR": str(folder)}
    environment[reaper.MARK] = str(folder)
    with (folder / "log").open("w") as said:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        probe_address("127.0.0.1", port)
        yield f"127.0.0.1:{port}"
    finally:
        reaper.end_marked(folder)
        process.wait()


def connect(address: str, tmp_path: Path, token: str | None, program: str = "") -> subprocess.CompletedProcess[str]:
    """A process of its own that joins and then runs `program`; it exits as `ryot-deploy` does."""
    code = f"""
import sys, time
from pathlib import Path
from ryot.cluster.options import ClusterOptions
from ryot.cluster.runtime import open_cluster
from ryot.errors import RyotError
begin = time.monotonic()
try:
    with open_cluster(ClusterOptions(address={address!r}), log_dir=Path({str(tmp_path)!r})) as cluster:
        print("joined", cluster.address)
{program}
except RyotError as error:
    print("Error:", error, "| hint:", error.hint, file=sys.stderr)
    print(time.monotonic() - begin)
    sys.exit(error.exit_code)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    if token:
        environment["RAY_AUTH_TOKEN"] = token
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)


def command_on(head: str, run_dir: Path, *more: str) -> list[str]:
    """A small `cluster-run` on that cluster."""
    library = Path(json.__file__).parents[1]
    options = ["--address", head, *tiny_recipes(run_dir.parent, "optimized"), *QUICK]
    options += ["--precisions", "int8-dyn", "-o", str(run_dir)]
    for package in ("asyncio", "email", "http", "xml/dom"):
        options += ["--data", f"{library}/{package}/*.py"]
    return [sys.executable, "-c", "from ryot.cli.main import run; run()", "cluster-run", *options, *more]


def run_on(head: str, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_on(head, run_dir, *more),
        env={**os.environ, "RAY_AUTH_TOKEN": TOKEN, "RYOT_CACHE_DIR": str(run_dir.parent / "cache")},
        capture_output=True,
        text=True,
        cwd=run_dir.parent,
    )


@pytest.mark.parametrize(("token", "said"), [("00" * 32, "does not accept our token"), (None, "demands a token")])
def test_a_wrong_or_missing_token_is_one_line_within_ten_seconds(
    head: str, tmp_path: Path, token: str | None, said: str
) -> None:
    done = connect(head, tmp_path, token)
    assert done.returncode == EXIT_FAILED
    assert f"Error: cluster {head}: it {said} | hint: set RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert float(done.stdout) < 10


def test_a_ray_client_address_is_wrong_usage(tmp_path: Path) -> None:
    done = connect("ray://127.0.0.1:10001", tmp_path, None)
    assert done.returncode == EXIT_USAGE
    assert "a Ray Client address, expected HOST:PORT" in done.stderr


def test_another_ray_version_is_named_with_what_to_do(head: str, tmp_path: Path) -> None:
    # The head's own record of its version is changed for the time of the test: there is one Ray to install here.
    change = """
        import json
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
        before = _internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster")
        changed = {**json.loads(before), "ray_version": "2.9.3"}
        _internal_kv_put(b"CLUSTER_METADATA", VALUE, overwrite=True, namespace=b"cluster")
        print(before.decode())
"""
    first = connect(head, tmp_path, TOKEN, change.replace("VALUE", "json.dumps(changed).encode()"))
    assert first.returncode == 0, first.stderr
    before = first.stdout.splitlines()[-1]
    assert json.loads(before)["ray_version"] != "2.9.3"
    code = f"""
from ray._raylet import GcsClient
client = GcsClient(address={head!r})
client.internal_kv_put(b"CLUSTER_METADATA", {before.encode()!r}, True, b"cluster")
"""
    try:
        done = connect(head, tmp_path, TOKEN)
        assert done.returncode == EXIT_FAILED
        assert f"Error: cluster {head}: its versions are not ours:" in done.stderr
        assert "2.9.3" in done.stderr
        assert "install the same Ray and Python minor version" in done.stderr
    finally:
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_without_a_shared_path_package_data_and_checkpoints_travel(
    head: str, folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """The driver works in a folder that exists in its mount namespace alone, as on another machine."""
    private = tmp_path / "private"
    private.mkdir()
    script = f"""
mount -t tmpfs none {private} && cp -r {dataset.path} {private}/dataset &&
{sys.executable} {Path(__file__).with_name("train_program.py")} {private}/run {private}/dataset --address {head} &&
cp -r {private}/run {tmp_path}/run
"""
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("needs the privilege to unshare a mount namespace")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": TOKEN}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoints travel through the driver" in done.stderr
    for name, expected in learned_alone(plan_both(dataset, 60), tmp_path / "alone").items():
        [last] = (tmp_path / f"run/variants/{name}/seed-0/attempt-1").glob("step-00000060")
        assert learned(last) == expected
    assert list(private.iterdir()) == []
    assert not list(folder.glob("ryot-worker-*"))


def test_a_cluster_that_cannot_carry_the_run_is_refused_before_it_trains(head: str, tmp_path: Path) -> None:
    """All of its CPUs are taken by another job, and no node has the label that is asked for."""
    wrong = run_on(head, tmp_path / "label", "--bench-on", "arm")
    assert wrong.returncode == EXIT_FAILED, wrong.stderr
    assert f"Error: bench-on: no node of {head} carries 'arm' (there are: measure)" in wrong.stderr
    assert "step" not in wrong.stderr
    program = f"""
        import os, ray, subprocess
        os.environ["RYOT_CACHE_DIR"] = {str(tmp_path / "cache")!r}
        @ray.remote(num_cpus=2)
        class Other:
            def ready(self): return True
        other = Other.remote()
        ray.get(other.ready.remote())
        done = subprocess.run({command_on(head, tmp_path / "busy")!r}, capture_output=True, text=True)
        print(done.returncode, done.stderr)
"""
    done = connect(head, tmp_path, TOKEN, program)
    assert "training needs 1 CPUs free on one node, but free CPUs are: " in done.stdout, done.stdout + done.stderr
    assert "hint: wait until other jobs have ended, or add nodes" in done.stdout


def test_a_node_lacks_what_training_needs_or_has_another_time(caplog: pytest.LogCaptureFixture) -> None:
    whole = NodeFacts("here", "3.11.7", [], {}, time.time())
    check_facts([whole])
    assert not caplog.records
    check_facts([whole, dataclasses.replace(whole, hostname="late", clock=time.time() - 3600)])
    assert "node late: its clock differs by -3600 s" in caplog.text
    with pytest.raises(ClusterError, match="node bare: torch, safetensors not installed") as caught:
        check_facts([whole, dataclasses.replace(whole, hostname="bare", missing=["torch", "safetensors"])])
    assert "ryot[train]" in str(caught.value.hint)


def test_a_node_that_carries_the_label_measures_alone_and_keeps_nothing(
    head: str, folder: Path, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    program = f"""
        import json
        from ryot.cluster.measuring import measure_on_node
        from ryot.edge.bundle import load_bundle
        from ryot.edge.measure import build_spec
        spec = build_spec(load_bundle(Path({str(bundle)!r})), min_runs=3, min_time_s=0.0)
        for label in ("measure", "", "arm"):
            measured = measure_on_node(cluster, dict(a=spec, b=spec), label=label, rounds=1)
            results = [[case, r.ok, r.reason, r.runs] for case, (r,) in measured.results.items()]
            print(json.dumps([measured.node, results]))
"""
    done = connect(head, tmp_path, TOKEN, program)
    assert done.returncode == EXIT_FAILED
    assert f"Error: bench-on: no node of {head} carries 'arm' (there are: measure)" in done.stderr
    for line in done.stdout.splitlines()[1:3]:  # with the label, and on the driver's own node
        node, results = json.loads(line)
        assert node.startswith(socket.gethostname())
        assert sorted(results) == [["a", True, "", 3], ["b", True, "", 3]]
    assert not list(folder.glob("ryot-measure-*"))


def test_a_whole_run_trains_on_two_ranks_and_measures_on_the_labelled_node(head: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = run_on(head, run_dir, "--bench-on", "measure", "--workers-per-variant", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads((run_dir / "report.json").read_text())
    assert [r["verdicts"]["phase1"]["size"] is None for r in report["rows"]] == [True]
    assert report["variants"][0]["test_loss"] < report["variants"][0]["initial_val_loss"]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    details = [e["detail"] for e in events if e["kind"] == "stage"]
    assert any("2 ranks" in d for d in details)
    assert any(d.startswith("1 artifacts, ") and f"on {socket.gethostname()}" in d for d in details)


def test_a_head_that_falls_silent_ends_the_run_with_a_way_on(head: str, folder: Path, tmp_path: Path) -> None:
    # The last test of this module: it ends the module's head.
    watch = f"""
        import os, signal
        from ryot.cluster import reaper, runtime
        runtime.HEAD_LOST_S, runtime._ASK_EVERY_S = 2.0, 0.5
        [server] = reaper.find_marked(Path({str(folder)!r}), programs=("gcs_server",))
        assert cluster.is_whole()
        os.kill(server, signal.SIGKILL)
        while cluster.is_whole():
            time.sleep(0.1)
        cluster.restart()
"""
    done = connect(head, tmp_path, TOKEN, watch)
    # Either ours or Ray's own end of the process; the code is the same.
    assert done.returncode == EXIT_FAILED
    assert f"cluster {head}: its head has not answered for 2 s; the run ends here" in done.stderr
    with pytest.raises(ClusterError):
        probe_address(*head.split(":")[:1], int(head.split(":")[1]))
