"""Several hosts, by `cluster/netns/lab.py`: a node is killed, a link is cut, and the zombie on the far side goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ryot.cluster import reaper
from ryot.train.checkpoint import checkpoint_digest
from ryot.train.dataset import Dataset
from tests.cluster.conftest import PROGRAM, learned, learned_alone, plan_both, records, wait_for_event

ROOT = Path(__file__).parents[2]
LAB = ROOT / "cluster/netns/lab.py"
STEPS = 200


class Lab:
    """A lab of two hosts of one core each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "RYOT_LAB": str(folder), "RYOT_LAB_NET": "10.78.0", "PYTHONPATH": str(ROOT)}

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(LAB), *arguments], env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def driver(self, run_dir: Path, dataset: Dataset) -> subprocess.Popen[str]:
        """The test driver on the head's host."""
        program = [sys.executable, str(PROGRAM), str(run_dir), str(dataset.path), "--address", "10.78.0.1:6379"]
        return subprocess.Popen(
            [sys.executable, str(LAB), "exec", "1", *program, "--steps", str(STEPS)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def lab() -> Iterator[Lab]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    probe = f"ryot-probe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    subprocess.run(["ip", "netns", "del", probe], check=True)
    folder = Path(tempfile.mkdtemp(prefix="ryotlab", dir="/tmp"))
    folder.rmdir()
    lab = Lab(folder)
    lab("up", "2", "1")
    try:
        yield lab
    finally:
        lab("down")


def test_the_lab_leaves_nothing_and_says_how_it_is_used(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(LAB), "--help"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "lab.py cut HOST" in done.stderr


def test_a_cut_link_is_noticed_and_what_the_far_side_goes_on_to_write_does_not_count(
    lab: Lab, dataset: Dataset, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    driver = lab.driver(run_dir, dataset)
    begun = wait_for_event(driver, "stage")
    while "10.78.0.2" not in begun["detail"]:
        begun = wait_for_event(driver, "stage")
    far = begun["variant"]
    assert driver.stdout is not None
    for line in driver.stdout:
        event = json.loads(line)
        if event["kind"] == "checkpoint" and event["variant"] == far:
            break
    lab("cut", "2")
    cut_at = time.time()
    zombies = [p for p in reaper.find_marked(lab.folder) if _is_worker(p) and _address_of(p) == "10.78.0.2"]
    lost = wait_for_event(driver, "stage")
    while lost["status"] != "lost":
        lost = wait_for_event(driver, "stage")
    assert lost["variant"] == far
    # The lab has the settings that the other files recommend: at most 3 x (1.5 + 2.5) s.
    assert lost["time"] - cut_at < 15
    assert zombies
    results = {}
    for _ in range(2):
        result = wait_for_event(driver, "result")
        results[result["variant"]] = Path(result["checkpoint"])
    driver.communicate(timeout=600)
    assert driver.returncode == 0
    expected = learned_alone(plan_both(dataset, STEPS), tmp_path / "alone")
    assert {name: learned(checkpoint) for name, checkpoint in results.items()} == expected
    attempts = {r["attempt"]: r["time"] for r in records(run_dir, "attempt") if r["key"] == f"{far}/seed-0"}
    assert sorted(attempts) == [1, 2]
    for record in records(run_dir, "checkpoint"):
        if record["key"] == f"{far}/seed-0" and record["attempt"] == 1:
            assert record["time"] < attempts[2]
    newest = records(run_dir, "checkpoint")[-1]
    assert checkpoint_digest(run_dir / newest["path"]) == newest["sha256"]


def _is_worker(pid: int) -> bool:
    return b"TrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _address_of(pid: int) -> str:
    said = subprocess.run(
        ["nsenter", "-t", str(pid), "-n", "ip", "-4", "-o", "addr", "show", "eth0"], capture_output=True, text=True
    ).stdout
    return said.split()[3].partition("/")[0] if said else ""
