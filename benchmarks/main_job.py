"""How long does a default `ryot-deploy cluster-run` take, stage by stage, and what does it need and leave behind?

    python benchmarks/main_job.py [-- ANY cluster-run OPTIONS]

Runs the command in a fresh run folder with an empty cache, so that tokenizer, shards and decisions are made too. While
it runs, the memory of all its processes is summed every half second (proportional set size, so shared pages count
once); before and after, the temporary folder and the process table are compared. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from record import describe_setting, write_result

from ryot.events import EvalEvent, Event, StageEvent, read_events
from ryot.report.rows import load_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="main_job", help="name of the result (default main_job)")
    parser.add_argument("options", nargs="*", help="options of cluster-run, after --")
    options = parser.parse_args()
    before = set(Path(tempfile.gettempdir()).iterdir())
    with tempfile.TemporaryDirectory(prefix="main-job-", dir=Path.home()) as scratch:
        run_dir = Path(scratch) / "run"
        command = [sys.executable, "-c", "from ryot.cli.main import run; run()", "cluster-run", "-o", str(run_dir)]
        command += options.options
        environment = os.environ | {"RYOT_CACHE_DIR": str(Path(scratch) / "cache")}
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        watch = _MemoryWatch(process.pid)
        table, _ = process.communicate()
        wall_s = time.monotonic() - begin
        watch.stop()
        left = sorted(p.name for p in set(Path(tempfile.gettempdir()).iterdir()) - before)
        alive = [p.name() for p in watch.seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        events = list(read_events(run_dir / "events.jsonl"))
        report = json.loads((run_dir / "report.json").read_text())
        for row in report["rows"]:
            for sample in row["samples"]:
                del sample["token_ms"]  # a number per token: megabytes that no question here is about
        trainings = load_report(run_dir).variants
    stages = [
        {"stage": e.stage, "variant": e.variant, "status": e.status, "wall_s": e.wall_s}
        for e in events
        if isinstance(e, StageEvent) and e.wall_s is not None
    ]
    ray = ray_cost(events)
    losses = [(e.variant, e.seed, e.step, e.train_wall_s, e.split, e.loss) for e in events if isinstance(e, EvalEvent)]
    values = {
        **describe_setting(),
        "wall_s": wall_s,
        "exit_code": process.returncode,
        "peak_pss_bytes": watch.peak_bytes,
        "left_in_temp": left,
        "left_running": alive,
        "stages": stages,
        "ray_s": ray,
        "losses": losses,
        "report": report,
    }
    lines = [
        f"# A default run, {values['environment']['cpu']['model']}, commit {values['commit']}",
        "",
        f"`ryot-deploy cluster-run {' '.join(options.options)}` with an empty cache: **{wall_s:.0f} s**, exit code "
        f"{process.returncode}, peak memory of all processes {watch.peak_bytes / 1e9:.2f} GB, "
        f"left in the temporary folder: {', '.join(left) or 'nothing'}; left running: {', '.join(alive) or 'nothing'}.",
        "",
        "| stage | variant | s |",
        "|---|---|---:|",
        *(f"| {s['stage']} | {s['variant']} | {s['wall_s']:.1f} |" for s in stages),
        "",
        f"Ray's own cost: {', '.join(f'{part} {s:.1f} s' for part, s in ray.items())}: {sum(ray.values()):.1f} s"
        " of at most 12 asked for.",
        "",
        "Trainings ran at the same time, one per core.",
        "",
        "| variant | seed | parameters | tokens | training s | validation loss | test loss |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {t.name} | {t.seed} | {t.params:,} | {t.tokens:,} | {t.train_wall_s:.1f} | {t.val_loss:.4f} "
            f"| {t.test_loss:.4f} |"
            for t in trainings
        ),
        "",
        "```",
        table.rstrip(),
        "```",
    ]
    print(write_result(options.name, values, "\n".join(lines)))


def ray_cost(events: list[Event]) -> dict[str, float]:
    """Seconds that a run spent on having a cluster: until it is up, until every worker has its training, until it is
    gone. Nothing else happens in these times."""
    stages = [e for e in events if isinstance(e, StageEvent)]

    def at(stage: str, status: str, *, variant: bool = False) -> list[float]:
        return [e.time for e in stages if (e.stage, e.status, bool(e.variant)) == (stage, status, variant)]

    return {
        "start": at("cluster", "end")[0] - at("cluster", "begin")[0],
        "workers": max(at("train", "begin", variant=True)) - at("train", "begin")[0],
        "shutdown": at("measure", "begin")[0] - at("train", "end")[0],
    }


class _MemoryWatch:
    """Sums the memory of a process and all its descendants, twice per second, in a thread."""

    def __init__(self, pid: int):
        self.peak_bytes = 0
        self.seen: dict[int, psutil.Process] = {}
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(0.5):
            total = 0
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                self.seen.setdefault(process.pid, process)
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


if __name__ == "__main__":
    main()
