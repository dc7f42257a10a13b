"""How well does the measurement tell two bundles apart on this machine?

Records one bundle against itself, interleaved as always, and cuts the recording into disjoint windows. Reports in how
many windows A differs from A (at most 5 in 100 are allowed) and the smallest true slowdown that four of five windows
find (10 % is required, 5 % the ambition). Leave the machine alone meanwhile.

    python benchmarks/measurement.py runs/NAME/bundle --windows 100 --rounds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from record import RESULTS, describe_setting, write_result

from ryot.edge.bundle import load_bundle
from ryot.edge.measure import build_spec, measure_rounds
from ryot.edge.noise import find_noise
from ryot.edge.protocol import MeasureResult
from ryot.report.resolution import measure_resolution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("--windows", type=int, default=100, metavar="N", help="windows to record (default 100)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds a window (default 3)")
    parser.add_argument("--min-runs", type=int, default=16, metavar="N", help="runs a process (default 16)")
    parser.add_argument("--min-time", type=float, default=1.0, metavar="S", help="seconds per process (default 1)")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    options = parser.parse_args()

    spec = build_spec(load_bundle(options.bundle), min_runs=options.min_runs, min_time_s=options.min_time)
    total = options.windows * options.rounds
    begin = time.monotonic()

    def tell(case: str, result: MeasureResult) -> None:
        number = result.round + 1
        print(f"\rround {number} of {total}, {time.monotonic() - begin:.0f} s", end="", file=sys.stderr, flush=True)

    results = measure_rounds({"a": spec, "b": spec}, rounds=total, on_result=tell)
    print(file=sys.stderr)
    every = [r for found in results.values() for r in found]

    def series(case: str, metric: str) -> list[list[float]]:
        """Times, so that larger is slower: a rate is turned over."""
        ordered = sorted(results[case], key=lambda r: r.round)
        values = [list(getattr(r, metric)) if r.ok else [] for r in ordered]
        return [[1000 / v for v in r] for r in values] if metric == "decode_tok_s" else values

    found = {
        title: dataclasses.asdict(measure_resolution(series("a", metric), series("b", metric), rounds=options.rounds))
        for title, metric in (("TTFT", "ttft_ms"), ("time a token", "decode_tok_s"))
    }
    noise = find_noise(every)
    setting = describe_setting()
    lines = [
        "# What the measurement can tell apart",
        "",
        f"`{setting['command']}` at commit {setting['commit']}, {setting['environment']['cpu']['model']},"
        f" {setting['environment']['cpu']['cores']} cores, {len(every)} processes"
        f" in {time.monotonic() - begin:.0f} s.",
        "",
        "| figure | windows | rounds | A differs from A | smallest slowdown found (80 %) |",
        "|:--|--:|--:|--:|--:|",
        *(
            f"| {title} | {f['windows']} | {f['rounds']} | {f['false_alarms']} | {f['smallest_slowdown']:.1%} |"
            for title, f in found.items()
        ),
        "",
        *(f"Noise: {note}." for note in noise),
    ]
    raw = {**setting, "found": found, "noise": noise, "results": [_keep(r) for r in every]}
    print(write_result("measurement", raw, "\n".join(lines), options.output))


def _keep(result: MeasureResult) -> dict[str, object]:
    """What the verdicts come from: with the time of each single token a thousand processes would fill megabytes."""
    return {
        "case": result.case,
        "round": result.round,
        "ok": result.ok,
        "reason": result.reason,
        "ttft_ms": [round(v, 3) for v in result.ttft_ms],
        "decode_tok_s": [round(v) for v in result.decode_tok_s],
        "steady": result.steady,
        "calibration_ms": [round(v, 2) for v in result.calibration_ms],
    }


if __name__ == "__main__":
    main()
