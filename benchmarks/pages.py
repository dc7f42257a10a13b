"""What are the two calls of `ryot/edge/pages.py` worth: huge pages for large weights, and code given back?

    python benchmarks/pages.py [--sizes S,M,L] [--rounds N] [--core C] [--models DIR]

Takes the bundles that `edge_vs_peers.py --prepare` made in DIR. Of each artifact, processes with and without the calls
take turns on one core, in an order drawn anew each round; nothing else differs. A process loads, answers a prompt of
128 tokens and decodes 100 (so far goes its first peak), then answers more prompts and decodes 48 tokens after each.
Before the second prompt memory is moved; how long that prompt takes longer is the price. Ratios are of times per
token, without to with, paired by round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import RESULTS, describe_setting, write_result

from ryot.report.stats import ratio_interval

ARTIFACTS = ("fp32", "int8", "int4")
TURNS = {"S": 20, "M": 6, "L": 3}
WORKER = Path(__file__).with_name("pages_worker.py")
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MB = 1e6


def main() -> None:
    options = _parse()
    results: dict[str, Any] = {}
    for size in options.sizes:
        bundles = json.loads((options.models / size / "models.json").read_text())["bundles"]
        for artifact in ARTIFACTS:
            runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
            for number in range(options.rounds):
                cases = [True, False]
                random.Random(f"{size}/{artifact}/{number}").shuffle(cases)
                for calls in cases:
                    runs[calls].append(_spawn(bundles[artifact], calls, TURNS[size], options.core))
            results[f"{size} {artifact}"] = {"with": runs[True], "without": runs[False]}
    values = {**describe_setting(), "core": options.core, "rounds": options.rounds, "results": results}
    values["huge_pages"] = ENABLED.read_text().strip() if ENABLED.is_file() else "none"
    print(write_result("pages", values, render(values), options.output).read_text())


def _spawn(bundle: str, calls: bool, turns: int, core: int) -> dict[str, Any]:
    command = ["taskset", "-c", str(core), sys.executable, str(WORKER), bundle, str(int(calls)), str(turns)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def render(values: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"# Huge pages and code given back, {values['environment']['cpu']['model']}, commit {values['commit']}",
        "",
        f"`{values['command']}` on core {values['core']}, {values['rounds']} rounds; kernel "
        f"{values['environment']['kernel']}, transparent huge pages {values['huge_pages']}. Ratios are without the "
        "calls to with them, with the 98 % interval over rounds; times and peaks of resident memory are medians of "
        "processes, without and with the calls; the first peak is before memory is moved.",
        "",
        "| artifact | ms per token, ratio | 98 % | second prompt, ms | load, ms | first peak, MB | last peak, MB |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for name, cases in values["results"].items():
        found = ratio_interval([r["token_ms"] for r in cases["without"]], [r["token_ms"] for r in cases["with"]])
        assert found is not None
        pairs = [
            " and ".join(
                f"{statistics.median(get(run) for run in cases[case]):.{digits}f}" for case in ("without", "with")
            )
            for get, digits in (
                (lambda run: run["prompt_ms"][1], 1),
                (lambda run: run["load_ms"], 1),
                (lambda run: run["first_peak_rss_bytes"] / MB, 1),
                (lambda run: run["peak_rss_bytes"] / MB, 1),
            )
        ]
        lines.append(f"| {name} | {found.value:.3f} | {found.low:.3f} to {found.high:.3f} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    root = os.environ.get("RYOT_CACHE_DIR") or Path("~/.cache/ryot").expanduser()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="S,M,L", metavar="S,M,L", help="sizes (default all)")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="processes of each kind (default 6)")
    parser.add_argument(
        "--core", type=int, default=max(os.sched_getaffinity(0)), metavar="C", help="the core they share"
    )
    parser.add_argument("--models", type=Path, default=Path(root) / "edge_vs_peers", metavar="DIR", help="models")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    options = parser.parse_args()
    options.sizes = options.sizes.split(",")
    for size in options.sizes:
        if not (options.models / size / "models.json").is_file():
            parser.error(f"--models: {options.models} has no models of size {size!r}; run edge_vs_peers.py --prepare")
    return options


if __name__ == "__main__":
    main()
