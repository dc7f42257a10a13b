"""What are the two calls of `ryot/edge/pages.py` worth: huge pages for large weights, and code given back?

    python benchmarks/pages.py [--sizes S,M,L] [--rounds N] [--core C] [--models DIR]

Takes the bundles that `edge_vs_peers.py --prepare` made in DIR. Of each form, processes with and without the calls take
turns on one core, in an order drawn anew each round; nothing else differs. A process loads, answers a prompt of 128
tokens and decodes 100 (that far goes its peak memory), then answers more prompts and decodes 48 tokens after each.
Before the second prompt memory is moved; how long that prompt takes longer is the price. Ratios are of times a token,
without to with, paired by round.
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

FORMS = ("fp32", "int8", "int4")
TURNS, STEPS = {"S": 20, "M": 6, "L": 3}, 48
MB = 1e6


def measure(bundle: str, calls: bool, turns: int) -> dict[str, Any]:
    """The figures of this process, which should be fresh."""
    import time

    import ryot.edge.capi as capi
    import ryot.edge.engine as engine
    from ryot.edge.bundle import load_bundle
    from ryot.edge.probe import read_peak_rss_bytes

    if not calls:
        capi.release_code = lambda: 0
        engine.move_to_huge_pages = lambda: 0
    begin = time.perf_counter()
    decoder = capi.CapiDecoder(load_bundle(bundle, verify=False))
    load_ms = (time.perf_counter() - begin) * 1e3
    draw = random.Random(0)
    peak, prompt_ms, token_ms = 0, [], []
    for turn in range(turns + 1):
        ids = [[draw.randrange(1, decoder.bundle.model.vocab_size) for _ in range(128)]]
        begin = time.perf_counter()
        decoder.prefill(ids)
        answered = time.perf_counter()
        steps = STEPS if turn else 100
        for _ in range(steps):
            decoder.step()
        prompt_ms.append((answered - begin) * 1e3)
        if turn:
            token_ms.append((time.perf_counter() - answered) / steps * 1e3)
        else:
            peak = read_peak_rss_bytes("self") or 0
    return {"load_ms": load_ms, "peak_rss_bytes": peak, "prompt_ms": prompt_ms, "token_ms": token_ms}


def main() -> None:
    options = _parse()
    results: dict[str, Any] = {}
    for size in options.sizes:
        bundles = json.loads((options.models / size / "models.json").read_text())["bundles"]
        for form in FORMS:
            runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
            for number in range(options.rounds):
                arms = [True, False]
                random.Random(f"{size}/{form}/{number}").shuffle(arms)
                for calls in arms:
                    runs[calls].append(_spawn(bundles[form], calls, TURNS[size], options.core))
            results[f"{size} {form}"] = {"with": runs[True], "without": runs[False]}
    values = {**describe_setting(), "core": options.core, "rounds": options.rounds, "results": results}
    print(write_result("pages", values, render(values), options.output).read_text())


def _spawn(bundle: str, calls: bool, turns: int, core: int) -> dict[str, Any]:
    command = ["taskset", "-c", str(core), sys.executable, __file__, "--child", bundle, str(int(calls)), str(turns)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def render(values: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"# Huge pages and code given back, {values['environment']['cpu']['model']}, commit {values['commit']}",
        "",
        f"`{values['command']}` on core {values['core']}, {values['rounds']} rounds; kernel "
        f"{values['environment']['kernel']}. Ratios are without the calls to with them, with the 98 % interval "
        "over rounds; times and memory are medians of processes.",
        "",
        "| form | a token, ratio | 98 % | second prompt longer, ms | load longer, ms | peak RSS, MB, without | with |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for name, arms in values["results"].items():
        found = ratio_interval([r["token_ms"] for r in arms["without"]], [r["token_ms"] for r in arms["with"]])
        assert found is not None
        price = {arm: statistics.median(r["prompt_ms"][1] for r in runs) for arm, runs in arms.items()}
        load = {arm: statistics.median(r["load_ms"] for r in runs) for arm, runs in arms.items()}
        peak = {arm: statistics.median(r["peak_rss_bytes"] for r in runs) / MB for arm, runs in arms.items()}
        longer = [price["with"] - price["without"], load["with"] - load["without"]]
        lines.append(
            f"| {name} | {found.value:.3f} | {found.low:.3f} to {found.high:.3f} | {longer[0]:.0f} | {longer[1]:.1f} | "
            f"{peak['without']:.1f} | {peak['with']:.1f} |"
        )
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
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3] == "1", int(sys.argv[4]))))
    else:
        main()
