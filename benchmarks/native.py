"""How soon is the first token there, and how much memory does it take, with the C program and with run.py?

    python benchmarks/native.py [--sizes S,M] [--rounds N] [--core C]

Bundles with random weights, of the sizes of `edge_vs_peers.py`, and a byte-level BPE of the standard library's text are
made first. Per precision the two programs take turns on one core, in an order drawn anew each round: a fresh process
continues one word by 48 greedy tokens. The clock runs from its start to the first byte that comes out of it. Memory is
VmHWM as the system tells it while the last text is read. Ratios are run.py's to the C program's, paired by round, with
the 98 % interval. Both must print the same text.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_models import SIZES
from record import RESULTS, describe_setting, write_result
from small_bundles import make_bundles

from ryot.report.stats import ratio_interval

NATIVE = Path(__file__).resolve().parents[1] / "deploy" / "native"
PRECISIONS = ("fp32", "int8", "int4", "int8-dyn+int4")
TOKENS = 48
PROMPT = "10"
MB = 1e6


def main() -> None:
    options = _parse()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        build = Path(scratch) / "native"
        subprocess.run(["make", "-s", "-C", NATIVE, f"BUILD={build}", f"PYTHON={sys.executable}"], check=True)
        for size in options.sizes:
            bundles = make_bundles(SIZES[size], PRECISIONS, Path(scratch) / size)
            for precision in PRECISIONS:
                bundle, limits = str(bundles[precision]), ["--ignore-eos", "--max-new-tokens", str(TOKENS)]
                programs = {
                    "c": [f"{build}/ryot-run", bundle, PROMPT, *limits],
                    "run.py": [sys.executable, f"{bundle}/run.py", "--prompt", PROMPT, *limits],
                }
                results[f"{size} {precision}"] = _measure(programs, options.rounds, options.core, f"{size}/{precision}")
    values = {**describe_setting(), "core": options.core, "rounds": options.rounds, "results": results}
    print(write_result("native", values, render(values), options.output).read_text())


def _measure(
    programs: Mapping[str, Sequence[str]], rounds: int, core: int, name: str
) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for number in range(-1, rounds):
        order = list(programs)
        random.Random(f"{name}/{number}").shuffle(order)
        round_runs = {program: _run(programs[program], core) for program in order}
        if len({run.pop("text") for run in round_runs.values()}) != 1:
            raise SystemExit(f"{name}: the two programs print different texts")
        for program, run in round_runs.items():
            if number >= 0:  # the first round fills the system's file cache
                runs[program].append(run)
    return runs


def _run(command: Sequence[str], core: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        ["taskset", "-c", str(core), *command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None
    text = os.read(process.stdout.fileno(), 1)
    first = time.perf_counter() - started
    peak = 0
    while piece := os.read(process.stdout.fileno(), 1 << 16):
        text += piece
        peak = max(peak, _peak_bytes(process.pid))
    process.stdout.close()
    if process.wait():
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return {"first_ms": first * 1e3, "peak_bytes": peak, "text": text}


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has had; 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def render(values: Mapping[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"# The C program beside run.py, {values['environment']['cpu']['model']}, commit {values['commit']}",
        "",
        f"`{values['command']}` on core {values['core']}, {values['rounds']} rounds; a fresh process to the first "
        "byte of its text, and its peak of resident memory: medians, and in brackets the extremes. Ratios are run.py's "
        "to the C program's, with the 98 % interval over rounds.",
        "",
        "| artifact | C: first token, ms | run.py | ratio | C: peak, MB | run.py | ratio |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for name, runs in values["results"].items():
        cells = []
        for key, scale, digits in (("first_ms", 1.0, 1), ("peak_bytes", MB, 1)):
            ours, theirs = ([run[key] / scale for run in runs[program]] for program in ("c", "run.py"))
            found = ratio_interval([[value] for value in theirs], [[value] for value in ours])
            assert found is not None
            cells += [_spread(ours, digits), _spread(theirs, digits)]
            cells.append(f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(samples: Sequence[float], digits: int) -> str:
    middle, low, high = statistics.median(samples), min(samples), max(samples)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="S,M", metavar="S,M", help="sizes, in this order (default both)")
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="rounds (default 21)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), metavar="C", help="core of all")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    options = parser.parse_args()
    options.sizes = options.sizes.split(",")
    return options


if __name__ == "__main__":
    main()
