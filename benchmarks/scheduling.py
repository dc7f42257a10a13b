"""What does the cluster cost a run: Ray itself, idle cores, a killed worker? Threads or ranks for one variant?

    python benchmarks/scheduling.py [--rounds 3] [--tokens 204800]

On an embedded Ray on all cores of this machine:

* four equal variants with the recipe's own budget: the wall time of the driver against the ideal, which is the sum of
  the times of their training steps and evaluations over the cores. What is lost are the start of the workers (they
  import torch), checkpoints, and the core that has nothing left while the other one ends;
* a worker killed with SIGKILL in the middle: the time until its training is as far as it was when it was killed, less
  the work that no accepted checkpoint held;
* one variant on two cores: two threads of one process, or two processes (gloo) that share every batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from record import describe_setting, write_result

from ryot.cli.options import cache_dir
from ryot.cluster.driver import train_variants
from ryot.cluster.options import ClusterOptions, DriverOptions
from ryot.cluster.runtime import open_cluster
from ryot.config import VariantConfig, replace, resolve_variant
from ryot.events import CheckpointEvent, EvalEvent, Event, StageEvent, StepEvent
from ryot.run.folder import RunFolder
from ryot.run.journal import Journal
from ryot.run.training import Training, TrainResult, plan_training
from ryot.train.corpus import load_corpus
from ryot.train.dataset import prepare_dataset


class Bench:
    """A dataset, and runs of the driver on it."""

    def __init__(self, scratch: Path, tokens: int):
        self.scratch = scratch
        self.recipe = resolve_variant("optimized", "reference", tokens=tokens)
        dataset, _ = prepare_dataset(load_corpus(), self.recipe.model.vocab_size, cache_dir())
        self.dataset_dir = dataset.path
        self._runs = 0

    def plan(self, variant: VariantConfig, *, threads: int = 1, workers: int = 1) -> Training:
        kernels = replace(variant.kernels, threads=threads)
        return plan_training(variant, 0, self.dataset_dir, kernels, workers=workers)

    def run(
        self, jobs: list[Training], options: DriverOptions, emit: Callable[[Event], None] = lambda event: None
    ) -> dict[str, Any]:
        """Train on a Ray of its own; seconds of everything."""
        self._runs += 1
        run_dir = self.scratch / f"run-{self._runs}"
        run_dir.mkdir()
        folder = RunFolder(run_dir)
        journal = Journal(folder)
        journal.open_run()
        with open_cluster(ClusterOptions(), log_dir=run_dir / "logs") as cluster:
            begin = time.monotonic()
            results = train_variants(jobs, cluster=cluster, folder=folder, journal=journal, emit=emit, options=options)
            wall_s = time.monotonic() - begin
        journal.close()
        assert not [r for r in results if r.error], results
        return {
            "start_s": cluster.start_s,
            "shutdown_s": cluster.shutdown_s,
            "wall_s": wall_s,
            "results": results,
        }


def four_equal(bench: Bench) -> dict[str, float]:
    recipe = resolve_variant("optimized", "reference")
    jobs = [bench.plan(replace(recipe, name=f"variant-{k}")) for k in range(4)]
    evals: list[EvalEvent] = []
    run = bench.run(jobs, DriverOptions(), lambda event: evals.append(event) if isinstance(event, EvalEvent) else None)
    work_s = sum(r.metrics.train_wall_s or 0.0 for r in run["results"]) + sum(e.eval_wall_s or 0.0 for e in evals)
    ideal_s = work_s / len(os.sched_getaffinity(0))
    return {
        "wall_s": run["wall_s"],
        "ideal_s": ideal_s,
        "ratio": run["wall_s"] / ideal_s,
        "longer_s": run["wall_s"] - ideal_s,
        "start_s": run["start_s"],
        "shutdown_s": run["shutdown_s"],
    }


class Killer:
    """Kills the worker in the middle of its training and notes when the training is as far again."""

    def __init__(self) -> None:
        self.killed_at = self.killed_step = self.accepted_step = self.back_at = 0.0
        self.step_s = 0.0
        self.lost = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, CheckpointEvent) and not self.killed_at:
            self.accepted_step = float(event.step)
        elif isinstance(event, StageEvent) and event.status == "lost":
            self.lost = True
        elif isinstance(event, StepEvent):
            if not self.killed_at and event.step > 0.6 * event.num_steps:
                [worker] = [p for p in psutil.process_iter() if p.name().startswith("ray::TrainWorke")]
                worker.kill()
                self.killed_at, self.killed_step = time.time(), float(event.step)
                self.step_s = event.train_wall_s / event.step
            elif self.lost and not self.back_at and event.step >= self.killed_step:
                self.back_at = event.time


def killed(bench: Bench) -> dict[str, float]:
    killer = Killer()
    bench.run([bench.plan(bench.recipe)], DriverOptions(chunk_s=1.0, checkpoint_every_s=3.0), killer)
    assert killer.back_at, "the worker was not killed, or its training did not come back"
    redone_s = (killer.killed_step - killer.accepted_step) * killer.step_s
    lost_s = killer.back_at - killer.killed_at
    return {"until_as_far_s": lost_s, "redone_s": redone_s, "cost_s": lost_s - redone_s}


def tokens_per_s(results: list[TrainResult]) -> float:
    return float(results[0].metrics.tokens / results[0].metrics.train_wall_s)


def threads_or_ranks(bench: Bench) -> dict[str, float]:
    baseline = resolve_variant("baseline", "reference", tokens=bench.recipe.train.tokens)
    found = {}
    for variant in (baseline, bench.recipe):
        for name, options in (("1 thread", {}), ("2 threads", {"threads": 2}), ("2 ranks", {"workers": 2})):
            run = bench.run([bench.plan(variant, **options)], DriverOptions())
            found[f"{variant.name}, {name}"] = tokens_per_s(run["results"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=204_800, help="budget of a training that is killed or shared")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scheduling-") as scratch:
        bench = Bench(Path(scratch), args.tokens)
        equal, kills, speeds = [], [], []
        for _ in range(args.rounds):
            equal.append(four_equal(bench))
            kills.append(killed(bench))
            speeds.append(threads_or_ranks(bench))
            print(equal[-1], kills[-1], speeds[-1], sep="\n", file=sys.stderr, flush=True)
    setting = describe_setting()

    def median(rows: list[dict[str, float]], key: str) -> str:
        values = [r[key] for r in rows]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    lines = [
        f"# What the cluster costs a run, {setting['environment']['cpu']['model']}, commit {setting['commit']}",
        "",
        f"`{setting['command']}`, {len(os.sched_getaffinity(0))} cores, {args.rounds} rounds: median (least to most).",
        "",
        "| what | measured | asked |",
        "|:--|--:|--:|",
        f"| four equal variants: wall time over the ideal | {median(equal, 'ratio')} | <= 1.08 |",
        f"| that is longer by, s | {median(equal, 'longer_s')} | |",
        f"| Ray's start, s | {median(equal, 'start_s')} | |",
        f"| Ray's shutdown, s | {median(equal, 'shutdown_s')} | |",
        f"| a killed worker costs besides the work redone, s | {median(kills, 'cost_s')} | <= 8 |",
        "",
        "One variant on two cores, tokens per second:",
        "",
        "| variant and cores | tok/s |",
        "|:--|--:|",
        *(f"| {name} | {median(speeds, name)} |" for name in speeds[0]),
    ]
    values = {**setting, "equal": equal, "killed": kills, "speeds": speeds}
    print(write_result("scheduling", values, "\n".join(lines)))


if __name__ == "__main__":
    main()
