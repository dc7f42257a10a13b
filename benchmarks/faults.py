"""Does a run lose anything when its parts are killed at random moments?

    python benchmarks/faults.py [--faults 30] [--seed 0] [--lab] [--output FILE]

Two small trainings run under a driver of their own, again and again, while workers, Ray's raylet and control process
and the driver itself are killed (and the driver stopped) at random moments; with `--lab` (root) a cluster of two hosts
of `cluster/netns/lab.py` is joined and its links and nodes are among the victims. After each run: do both trainings
have the weights of undisturbed ones, is every accepted checkpoint whole, does a process or a temp folder remain?
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from ryot.cluster import reaper
from ryot.errors import EXIT_INTERRUPTED
from ryot.train.checkpoint import checkpoint_digest
from ryot.train.corpus import load_corpus
from ryot.train.dataset import prepare_dataset
from tests.cluster.conftest import PROGRAM, learned, learned_alone, plan_both
from tests.conftest import VOCAB_SIZE

ROOT = Path(__file__).parents[1]
LAB = ROOT / "cluster/netns/lab.py"
STEPS = 1200
EMBEDDED_FAULTS = ("worker", "worker", "raylet", "gcs_server", "driver", "stop")
LAB_FAULTS = ("worker", "link", "node", "driver", "stop")


class Bench:
    """Faults until there were enough of them."""

    def __init__(self, scratch: Path, dataset_dir: Path, arguments: argparse.Namespace):
        self.scratch, self.dataset_dir = scratch, dataset_dir
        self.random = random.Random(arguments.seed)
        self.lab = arguments.lab
        # Clusters of others on this machine are no victims: ours lie in a temp folder of our own.
        self.temp = scratch / "t"
        self.temp.mkdir()
        self.lab_folder = scratch / "lab"
        self.environment = {
            **os.environ,
            "TMPDIR": str(self.temp),
            "RYOT_LAB": str(self.lab_folder),
            "RYOT_LAB_NET": "10.79.0",
            "PYTHONPATH": str(ROOT),
        }
        self.left = arguments.faults
        self.faults: Counter[str] = Counter()
        self.runs: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def lab_command(self, *arguments: str) -> None:
        subprocess.run([sys.executable, str(LAB), *arguments], env=self.environment, check=True, capture_output=True)

    def start_driver(self, run_dir: Path) -> subprocess.Popen[str]:
        own = [sys.executable, str(PROGRAM), str(run_dir), str(self.dataset_dir), "--steps", str(STEPS)]
        own += ["--chunk-s", "0.3", "--checkpoint-every-s", "0.5"]
        if self.lab:
            own = [sys.executable, str(LAB), "exec", "1", *own, "--address", "10.79.0.1:6379"]
        return subprocess.Popen(own, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run_once(self, number: int, expected: dict[str, str]) -> None:
        """One run to its end through some faults."""
        run_dir = self.scratch / f"run-{number}"
        begin, faults = time.monotonic(), []
        driver = self.start_driver(run_dir)
        lost_node = False
        for _ in range(self.random.randint(2, 5)):
            if self.left == 0:
                break
            if not self.wait_for_training(run_dir, driver):
                break
            time.sleep(self.random.uniform(0.0, 3.0))
            if driver.poll() is not None:
                break
            kind = self.random.choice(LAB_FAULTS if self.lab else EMBEDDED_FAULTS)
            if kind in ("link", "node"):
                if lost_node:
                    continue
                lost_node = True
            if not self.do(kind, driver):
                continue
            faults.append(kind)
            self.faults[kind] += 1
            self.left -= 1
            if kind in ("driver", "stop"):
                _, said = driver.communicate(timeout=120)
                if kind == "stop" and driver.returncode not in (EXIT_INTERRUPTED, 0):
                    self.problems.append(
                        f"run {number}: a stopped driver ended with {driver.returncode}: {said[-500:]}"
                    )
                self.check_nothing_left(number)
                driver = self.start_driver(run_dir)
        _, said = driver.communicate(timeout=600)
        if driver.returncode != 0:
            self.problems.append(f"run {number} {faults}: exit code {driver.returncode}: {said[-800:]}")
        self.check_nothing_left(number)
        self.check_journal(number, run_dir, expected)
        self.runs.append({"faults": faults, "wall_s": round(time.monotonic() - begin, 1)})
        print(
            json.dumps({"run": number, **self.runs[-1], "left": self.left, "problems": len(self.problems)}), flush=True
        )
        if lost_node:
            self.lab_command("down")
            self.lab_command("up", "2", "1")

    def wait_for_training(self, run_dir: Path, driver: subprocess.Popen[str]) -> bool:
        """Wait until a worker trains; False when the driver has ended."""
        seen = count_records(run_dir)
        while driver.poll() is None:
            if count_records(run_dir) > seen + 1:
                return True
            time.sleep(0.1)
        return False

    def do(self, kind: str, driver: subprocess.Popen[str]) -> bool:
        """Let something happen; False when there is no such victim at the moment."""
        if kind == "driver":
            driver.kill()
            return True
        if kind == "stop":
            driver.send_signal(signal.SIGINT)
            return True
        if kind in ("link", "node"):
            self.lab_command("cut" if kind == "link" else "kill", "2")
            return True
        victims = self.find_processes(kind)
        if not victims:
            return False
        try:
            os.kill(self.random.choice(victims), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def find_processes(self, kind: str) -> list[int]:
        folders = [self.lab_folder] if self.lab else list(self.temp.glob("ryot-ray-*"))
        if kind != "worker":
            return [pid for folder in folders for pid in reaper.find_marked(folder, programs=(kind,))]
        found = []
        for pid in (pid for folder in folders for pid in reaper.find_marked(folder)):
            try:
                if b"TrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
            except OSError:
                continue
        return found

    def check_nothing_left(self, number: int) -> None:
        if self.lab:
            return
        deadline = time.monotonic() + 20
        while left := list(self.temp.glob("ryot-ray-*")):
            if time.monotonic() > deadline:
                self.problems.append(f"run {number}: {left} is left, with processes {reaper.find_marked(left[0])}")
                return
            time.sleep(0.1)

    def check_journal(self, number: int, run_dir: Path, expected: dict[str, str]) -> None:
        newest: dict[str, dict[str, Any]] = {}
        attempts: dict[str, int] = {}
        for line in (run_dir / "journal.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["record"] == "attempt":
                attempts[record["key"]] = record["attempt"]
            elif record["record"] == "checkpoint":
                if record["attempt"] != attempts[record["key"]]:
                    self.problems.append(f"run {number}: a checkpoint of a given-up attempt was accepted: {record}")
                if record["step"] < newest.get(record["key"], record)["step"]:
                    self.problems.append(f"run {number}: {record['key']} went back to step {record['step']}")
                newest[record["key"]] = record
            elif record["record"] == "rejected":
                self.problems.append(f"run {number}: a checkpoint was lost: {record}")
        for key, digest in expected.items():
            if key not in newest:
                self.problems.append(f"run {number}: {key} has no checkpoint")
                continue
            path = run_dir / newest[key]["path"]
            if checkpoint_digest(path) != newest[key]["sha256"] or learned(path) != digest:
                self.problems.append(f"run {number}: {key} did not learn what an undisturbed training learns")


def count_records(run_dir: Path) -> int:
    try:
        return (run_dir / "journal.jsonl").read_bytes().count(b'"checkpoint"')
    except OSError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lab", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="f-", dir="/tmp") as name:
        scratch = Path(name)
        dataset, _ = prepare_dataset(load_corpus(), VOCAB_SIZE, scratch / "cache")
        digests = learned_alone(plan_both(dataset, STEPS), scratch / "expected")
        expected = {f"{name}/seed-0": digest for name, digest in digests.items()}
        bench = Bench(scratch, dataset.path, arguments)
        if arguments.lab:
            bench.lab_command("up", "2", "1")
        try:
            number = 0
            while bench.left > 0:
                bench.run_once(number, expected)
                number += 1
        finally:
            if arguments.lab:
                bench.lab_command("down")
    result = {
        "where": "lab" if arguments.lab else "embedded",
        "seed": arguments.seed,
        "faults": dict(bench.faults),
        "runs": bench.runs,
        "problems": bench.problems,
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
