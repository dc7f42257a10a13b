"""At equal quality, how fast are our bundles beside llama.cpp's own quantizations and onnxruntime-genai's builder?

    python benchmarks/quality_speed.py SOURCE --llama-cpp DIR [--threads 1,2] [--kv8] [--rounds N] [--minutes M]
                                       [--only NAME,NAME] [--quick] [--prepare] [--work DIR] [--data PATH]

One source of weights for all: our bundles, llama.cpp's files made from our F16 file by its own quantizer, and what the
builders of onnxruntime-genai and mobius-onnx make of our Hugging Face folder. All are scored in bits per byte on the
same tokens by llama-perplexity's protocol (`quality_worker.py`); our float32 and llama.cpp's F16 must agree.

Speed is taken in rounds. In each, every point has a fresh process, pinned to the same cores, in an order drawn anew:
a short job in each round, a long and a cold one in the first three (`quality_jobs.py`); what is slow at length has one
long job. Each result is kept in the work folder, so that a run that was stopped, or ended after --minutes, goes on
where it was. DIR holds llama-quantize, llama-bench, llama-perplexity and llama-completion; benchmarks/README.md says
how to build them.

`--prepare` makes the models, scores them and stops. The result is `results/DATE-quality_speed-ISA.md`, `.json`, `.svg`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peer_process import HERE, ONE_THREAD, Worker
from quality_jobs import KINDS, JobError, longest, run_job
from quality_plan import QUICK, Lengths
from quality_plot import draw_frontiers
from quality_verdicts import judge, render
from quality_worker import Scorer
from record import RESULTS, describe_setting, write_result

PROGRAMS = ("llama-quantize", "llama-bench", "llama-perplexity", "llama-completion")
SHORT_ROUNDS, LONG_ROUNDS, COLD_ROUNDS = 4, 3, 3
#: A long job that would take longer than the first, by the short one's pace, is left out; than the second, taken once.
LONG_LIMIT_S, LONG_ONCE_S = 90.0, 15.0
MINUTES = 15.0
#: Arrays that bandwidth is read on in each round; weights of about these sizes are read a step.
BANDWIDTH_BYTES = (64 << 20, 256 << 20)
BANDWIDTH = "bandwidth"
#: Our float32 and llama.cpp's F16 may differ by this share in bits per byte: the rounding of weights and cache to F16.
AGREE = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One process: what it measures, of which point, with how many threads, in which round."""

    round: int
    threads: int
    kind: str
    point: str

    @property
    def file(self) -> str:
        return f"{self.threads}/{self.kind}-{self.round}-{self.point.replace(' ', '-')}.json"


def list_jobs(points: Sequence[str], threads: Sequence[int], rounds: int) -> list[Job]:
    """All jobs, round by round; inside a round and kind the points come in an order drawn anew."""
    jobs = []
    for number in range(rounds):
        for count in threads:
            kinds = ["short", *["long"] * (number < LONG_ROUNDS), *["cold"] * (number < COLD_ROUNDS)]
            jobs.append(Job(number, count, BANDWIDTH, "reader"))
            for kind in kinds:
                order = random.Random(f"{number}/{count}/{kind}").sample(list(points), len(points))
                jobs += [Job(number, count, kind, point) for point in order]
    return jobs


class Run:
    """The rounds; what was measured lies in a folder of its own for each set of lengths and models."""

    def __init__(self, options: argparse.Namespace, plan: Mapping[str, Any], made: Mapping[str, Any]):
        self._options, self._made = options, made
        self._lengths: Lengths = options.lengths
        self._points = {point["name"]: point for point in made["points"]}
        identity = json.dumps([dataclasses.asdict(self._lengths), plan["source"]])
        self._folder = Path(plan["folder"]) / f"samples-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        windows = np.load(Path(plan["folder"]) / "windows.npy").reshape(-1)
        needed = max(longest(self._lengths, kind) for kind in KINDS) + 64
        self._ids = np.resize(windows, max(needed, windows.size)).tolist()
        self._begin = time.monotonic()

    def take(self) -> bool:
        """Do the jobs that are not done; False when the time was up before."""
        jobs = list_jobs(sorted(self._points), self._options.threads, self._options.rounds)
        left = [job for job in jobs if not self._is_kept(job)]
        spent: dict[str, list[float]] = {}
        for position, job in enumerate(left):
            used_s = time.monotonic() - self._begin
            if used_s > self._options.minutes * 60:
                self._tell(f"{self._options.minutes:g} minutes are over with {len(left) - position} jobs left")
                return False
            typical = {kind: float(np.median(times)) for kind, times in spent.items()}
            left_s = sum(typical.get(j.kind, 10.0) for j in left[position:])
            self._tell(f"round {job.round + 1}, {job.threads} threads, {job.kind} {job.point}; {left_s:.0f} s left")
            begin = time.monotonic()
            self._keep(job, self._measure(job))
            spent.setdefault(job.kind, []).append(time.monotonic() - begin)
        return True

    def _measure(self, job: Job) -> dict[str, Any]:
        """What a job gave: `series`, or the reason why it gave nothing."""
        cores = self._options.cores[-job.threads :]
        load = os.getloadavg()[0]
        if job.kind == BANDWIDTH:
            reader = Worker(cores[-1])
            try:
                answer = reader.ask({"do": "bandwidth", "sizes": list(BANDWIDTH_BYTES)})
            finally:
                reader.close()
            return {"series": {BANDWIDTH: answer["bytes_per_s"]}, "load": load}
        needed_s = self._predict_s(job) if job.kind == "long" else 0.0
        if needed_s > LONG_LIMIT_S:
            reason = f"left out, its prompts would take {needed_s:.0f} s"
            return {"series": {}, "failed": reason, "load": load}
        if needed_s > LONG_ONCE_S and job.round:
            return {"series": {}, "load": load}
        start = 37 * job.round % 61
        try:
            series, detail = run_job(
                job.kind, self._points[job.point], self._lengths, cores, self._ids[start:], self._options.llama_cpp
            )
        except JobError as error:
            return {"series": {}, "failed": str(error), "load": load}
        rounded = {name: [float(f"{value:.6g}") for value in values] for name, values in series.items()}
        return {"series": rounded, "detail": detail, "load": load}

    def _predict_s(self, job: Job) -> float:
        """How long the prompts of a long job take, by the pace of the same round's short one."""
        path = self._folder / dataclasses.replace(job, kind="short").file
        series = json.loads(path.read_text())["series"]
        times = series.get(f"ttft@{self._lengths.prompt}", [0.0])
        tokens = self._lengths.long_prompt + self._lengths.long_depth
        return min(times) / 1e3 / self._lengths.prompt * tokens

    def _identity(self, job: Job) -> Any:
        """What a kept result must be of: another model in the same place is measured again."""
        if job.kind == BANDWIDTH:
            return list(BANDWIDTH_BYTES)
        point = self._points[job.point]
        return [point["path"], point["size_bytes"], self._options.cores[-job.threads :]]

    def _is_kept(self, job: Job) -> bool:
        path = self._folder / job.file
        return path.exists() and json.loads(path.read_text())["of"] == self._identity(job)

    def _keep(self, job: Job, answer: dict[str, Any]) -> None:
        path = self._folder / job.file
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({**answer, "of": self._identity(job)}))
        partial.replace(path)

    def collect(self, threads: int) -> dict[str, Any]:
        """Samples by point and series, a list a round; empty lists keep rounds paired that one point has not."""
        found: dict[str, Any] = {name: {"series": {}, "details": {}, "failed": []} for name in self._points}
        found["reader"] = {"series": {}, "details": {}, "failed": []}
        loads = []
        for job in list_jobs(sorted(self._points), [threads], self._options.rounds):
            if not self._is_kept(job):
                continue
            answer = json.loads((self._folder / job.file).read_text())
            loads.append(answer["load"])
            into = found[job.point]
            for name, values in answer["series"].items():
                rounds = into["series"].setdefault(name, [])
                rounds += [[] for _ in range(job.round - len(rounds))]
                rounds.append(values)
            if "failed" in answer:
                into["failed"].append(f"{job.kind}, round {job.round + 1}: {answer['failed']}")
            else:
                into["details"].setdefault(job.kind, answer.get("detail", ""))
        reader = found.pop("reader")["series"].get(BANDWIDTH, [])
        return {"points": found, "bandwidth": reader, "load": [min(loads), max(loads)] if loads else []}

    def _tell(self, text: str) -> None:
        print(f"{time.monotonic() - self._begin:6.0f} s  {text}", file=sys.stderr, flush=True)


def score_all(plan: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Bits per byte of each point, nats of each window, KL and top-1 of its reference, on equal tokens."""
    target_bytes = np.load(Path(plan["folder"]) / "target_bytes.npy").sum(axis=1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=plan["folder"], prefix="reference-") as scratch:
        scorer = Scorer(plan, made["points"], Path(scratch))
        for point in made["points"]:
            print(f"scoring {point['name']}", file=sys.stderr, flush=True)
            try:
                score = scorer.score(point)
            except RuntimeError as error:
                found[point["name"]] = {"failed": str(error)}
                continue
            found[point["name"]] = {
                "bpb": sum(score.nats) / float(np.log(2)) / float(target_bytes.sum()),
                "nats": [round(v, 4) for v in score.nats],
                "kl": score.kl,
                "top1": score.top1,
            }
    return {"points": found, "window_bytes": target_bytes.tolist(), "agree": _agreement(found)}


def _agreement(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether our float32 and llama.cpp's F16 score alike: that both read the same weights and tokens."""
    values = [found.get(name, {}).get("bpb") for name in ("fp32", "F16")]
    if None in values:
        return {}
    return {"ratio": values[0] / values[1], "limit": AGREE, "ok": abs(values[0] / values[1] - 1) <= AGREE}


def main() -> None:
    options = _parse()
    lengths = options.lengths
    plan = {
        "folder": str(options.work),
        "source": str(options.source),
        "llama_cpp": str(options.llama_cpp),
        "context": options.context,
        "caches": ["float32", *["int8"] * options.kv8],
        "only": options.only,
        "data": options.data,
        "quality": {"context": lengths.window, "chunks": lengths.windows},
    }
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    subprocess.run(
        [sys.executable, str(HERE / "quality_models.py"), str(options.work / "plan.json")],
        check=True,
        env=os.environ | ONE_THREAD,
    )
    made = json.loads((options.work / "models.json").read_text())
    quality = score_all(plan, made)
    if options.prepare:
        return
    # The one who waits does so on another core, where there is one.
    os.sched_setaffinity(0, set(options.allowed) - set(options.cores[-min(options.threads) :]) or set(options.allowed))
    run = Run(options, plan, made)
    complete = run.take()
    values = {
        **describe_setting(),
        "lengths": dataclasses.asdict(lengths),
        "rounds": options.rounds,
        "complete": complete,
        "quick": options.quick,
        "cores": options.cores,
        "made": made,
        "quality": quality,
        "threads": {str(count): run.collect(count) for count in options.threads},
    }
    values["verdicts"] = {count: judge(values, count) for count in values["threads"]}
    path = write_result("quality_speed", values, render(values), options.output)
    draw_frontiers(values, path.with_suffix(".svg"))
    print(path.read_text())


def _parse() -> argparse.Namespace:
    allowed = sorted(os.sched_getaffinity(0))
    cache = Path(os.environ.get("RYOT_CACHE_DIR") or Path("~/.cache/ryot").expanduser())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="what `ryot-deploy export` takes")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR", help="folder of llama.cpp's programs")
    parser.add_argument("--threads", default="1", metavar="N,N", help="numbers of threads (default 1)")
    parser.add_argument("--kv8", action="store_true", help="our bundles with an int8 cache too")
    parser.add_argument(
        "--rounds", type=int, default=SHORT_ROUNDS, metavar="N", help=f"rounds (default {SHORT_ROUNDS})"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help="time limit (default %(default)g)")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="points, by the names in the table")
    parser.add_argument("--quick", action="store_true", help="tiny lengths: whether it works, not to be quoted")
    parser.add_argument("--prepare", action="store_true", help="make and score the models and stop")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="context of our bundles (default the model's)")
    parser.add_argument("--data", action="append", default=[], metavar="PATH", help="text to score on, as in export")
    parser.add_argument("--work", type=Path, default=cache / "quality_speed", metavar="DIR", help="models and samples")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    options = parser.parse_args()
    options.lengths = QUICK if options.quick else Lengths()
    options.threads = [int(count) for count in options.threads.split(",")]
    options.allowed, options.cores = allowed, allowed[-max(options.threads) :]
    options.only = [name for name in options.only.split(",") if name]
    options.work, options.llama_cpp = options.work.absolute(), options.llama_cpp.absolute()
    stat = None
    if Path(options.source).exists():
        options.source = Path(options.source).absolute()
        stat = options.source.stat().st_size, options.source.stat().st_mtime_ns
    # What was made of another source, or of another file in its place, is not taken for this one's.
    mark = hashlib.sha256(repr((str(options.source), stat)).encode()).hexdigest()[:8]
    options.work /= f"{Path(options.source).stem}-{mark}"
    if len(options.cores) < max(options.threads) or options.rounds < 1:
        parser.error(f"--threads, --rounds: {len(allowed)} cores are allowed, and one round at least")
    if missing := [name for name in PROGRAMS if not os.access(options.llama_cpp / name, os.X_OK)]:
        parser.error(f"--llama-cpp: {options.llama_cpp} has no {missing[0]}")
    return options


if __name__ == "__main__":
    main()
