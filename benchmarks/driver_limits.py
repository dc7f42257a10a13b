"""What would limit a run on 10, 100 and 1,000 nodes: the journal, the scheduling, the storage or the measurement?

    python benchmarks/driver_limits.py [--output FILE]

Times the parts of the driver that grow with the run, each with the real code: a fsynced line of the journal, reading a
journal, finding a training's checkpoints in it, placing a worker, taking in a report. From these it computes the share
of one driver's time that a run of N nodes, one worker each, takes at the default chunk and checkpoint interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ryot.cluster.options import ClusterOptions, DriverOptions
from ryot.cluster.placement import Placement, ResourceRequest
from ryot.cluster.runtime import Cluster, Node
from ryot.cluster.worker import ChunkReport
from ryot.events import EventLog, StepEvent, event_to_dict
from ryot.mapping import to_mapping
from ryot.run.folder import RunFolder
from ryot.run.journal import CheckpointAccepted, Journal
from ryot.run.metrics import TrainMetrics

#: Measured with `many_variants.py` (2026-11-24): CPU time of the driver for one call of a worker, Ray's part included.
RAY_CALL_S = 0.003
SIZES = (10, 100, 1000)


class ManyNodes(Cluster):
    """A cluster that only knows how many nodes it has."""

    embedded = True

    def __init__(self, count: int):
        super().__init__(ClusterOptions(), Path())
        self._nodes = [Node(f"{i:056x}", f"node-{i}", f"10.0.{i // 250}.{i % 250 + 1}", 8.0, 0.0) for i in range(count)]

    def nodes(self) -> list[Node]:
        return self._nodes


def median_s(function: Callable[[], object], repeats: int = 50) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    options, one = DriverOptions(), ResourceRequest(1)
    metrics = TrainMetrics(tokens=1, train_wall_s=1.0, val_loss=3.9)
    step = StepEvent(
        variant="optimized",
        seed=0,
        step=1,
        num_steps=2,
        tokens=1,
        loss=3.9,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens_per_s=1e4,
        train_wall_s=1.0,
        rss_bytes=1,
        cpu_s=1.0,
    )
    report = ChunkReport(1, False, [step] * 3, None, TrainMetrics(tokens=1))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in SIZES:
            folder = Path(scratch) / str(count)
            folder.mkdir()
            journal = Journal(RunFolder(folder))
            known = {"digest": "d" * 64, "attempt": 1, "path": "p" * 60, "sha256": "s" * 64}
            checkpoint = CheckpointAccepted(key="v/seed-0", step=1, metrics=metrics, **known)
            # An hour of checkpoints, written without the driver's fsync.
            with (folder / "journal.jsonl").open("a") as file:
                for number in range(int(3600 / options.checkpoint_every_s)):
                    for node in range(count):
                        line = {
                            "record": "checkpoint",
                            **to_mapping(checkpoint),
                            "key": f"v/seed-{node}",
                            "step": number,
                        }
                        file.write(json.dumps(line) + "\n")
            journal.close()
            begin = time.perf_counter()
            journal = Journal(RunFolder(folder))
            load_s = time.perf_counter() - begin
            append_s = median_s(lambda j=journal, c=checkpoint: j.append(c))
            find_s = median_s(lambda j=journal: j.accepted("v/seed-0", "d" * 64), 5)
            placement = Placement(ManyNodes(count))
            placement.look()
            place_s = median_s(lambda p=placement: [p.release(n, one) for n in p.acquire(one)])
            log = EventLog(folder / "events.jsonl")

            def take_in(log: EventLog = log) -> None:
                metrics.after(report.counters, report.events)
                for event in report.events:
                    log.emit(event)
                    event_to_dict(event)

            report_s = median_s(take_in)
            # The driver asks for longer chunks when reports would take more than a quarter of its time.
            chunks_per_s = count / max(options.chunk_s, 4 * RAY_CALL_S * count)
            checkpoints_per_s = count / options.checkpoint_every_s
            rows.append(
                {
                    "nodes": count,
                    "journal_bytes_an_hour": (folder / "journal.jsonl").stat().st_size,
                    "journal_load_s": load_s,
                    "append_ms": append_s * 1e3,
                    "find_accepted_ms": find_s * 1e3,
                    "place_ms": place_s * 1e3,
                    "report_ms": (report_s + RAY_CALL_S) * 1e3,
                    "share_reports": chunks_per_s * (report_s + RAY_CALL_S),
                    "share_journal": checkpoints_per_s * append_s,
                    # A reference checkpoint: 2.1 M parameters, three fp32 copies.
                    "storage_mb_s": checkpoints_per_s * 2.136064e6 * 12 / 1e6,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            journal.close()
            log.close()
    if arguments.output:
        arguments.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
