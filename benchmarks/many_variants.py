"""What does the driver itself cost when a run has many variants: memory, open files, CPU a report, idle cores?

    python benchmarks/many_variants.py [--variants 200] [--steps 4] [--output DIR]

Trains that many tiny variants on an embedded Ray on all cores of this machine and records, after each tenth, the
driver's resident memory, open files and CPU time. It ends with the share of core time in which a worker trained.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from ryot.cluster.driver import train_variants
from ryot.cluster.options import ClusterOptions, DriverOptions
from ryot.cluster.runtime import open_cluster
from ryot.config import KernelPlan, VariantConfig, build_from_mapping, resolve_variant, to_mapping
from ryot.events import Event
from ryot.run.folder import RunFolder
from ryot.run.journal import Journal
from ryot.run.training import TrainResult, plan_training
from ryot.train.corpus import load_corpus
from ryot.train.dataset import prepare_dataset


def build_variant(number: int, steps: int, vocab_size: int) -> VariantConfig:
    values = to_mapping(resolve_variant("optimized", "reference"))
    values["name"] = f"variant-{number:03d}"
    values["model"] |= {"vocab_size": vocab_size, "dim": 64, "ff_dim": 64, "max_seq_len": 32}
    values["train"] |= {"batch_size": 4, "tokens": steps * 4 * 32, "warmup_fraction": 0.25}
    return build_from_mapping(VariantConfig, values, values["name"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--chunk-s", type=float, default=3.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dataset, _ = prepare_dataset(load_corpus(), 512, Path(scratch))
        jobs = [
            plan_training(build_variant(i, arguments.steps, 512), 0, dataset.path, KernelPlan())
            for i in range(arguments.variants)
        ]
        run_dir = Path(scratch) / "run"
        run_dir.mkdir()
        folder = RunFolder(run_dir)
        journal = Journal(folder)
        journal.open_run()
        driver = psutil.Process()
        samples: list[dict[str, float]] = []
        done: list[TrainResult] = []
        walls: list[float] = []

        def on_event(event: Event) -> None:
            if event.kind != "stage" or event.status != "end":
                return
            walls.append(event.wall_s)
            if len(walls) % max(1, arguments.variants // 10) == 0:
                cpu = driver.cpu_times()
                samples.append(
                    {
                        "variants": len(walls),
                        "rss_mb": driver.memory_info().rss / 1e6,
                        "open_files": driver.num_fds(),
                        "threads": driver.num_threads(),
                        "cpu_s": cpu.user + cpu.system,
                        "wall_s": time.monotonic() - begin,
                    }
                )
                print(json.dumps(samples[-1]), flush=True)

        with open_cluster(ClusterOptions(), log_dir=run_dir / "logs") as cluster:
            begin = time.monotonic()
            done = train_variants(
                jobs,
                cluster=cluster,
                folder=folder,
                journal=journal,
                emit=on_event,
                options=DriverOptions(chunk_s=arguments.chunk_s),
            )
            wall_s = time.monotonic() - begin
        busy_s = sum((r.metrics.train_wall_s or 0.0) for r in done)
        cores = len(os.sched_getaffinity(0))
        result = {
            "variants": len(done),
            "failed": sum(r.error is not None for r in done),
            "cores": cores,
            "wall_s": wall_s,
            "start_s": cluster.start_s,
            "shutdown_s": cluster.shutdown_s,
            "train_s_sum": busy_s,
            "median_wall_s_of_one": statistics.median(walls),
            "samples": samples,
        }
        print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=1))
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
