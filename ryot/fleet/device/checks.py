"""Whether a release works on this device: golden tokens, a measurement, and what the owner asks for."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ryot.errors import FleetError
from ryot.fleet.device.processes import error_of, run

#: Loading a gigabyte from an SD card takes a minute.
CHECK_TIMEOUT_S = 900
#: A measurement that only says whether a version works: one process, a moment.
BRIEF = {"min_runs": 3, "min_time_s": 0.1, "warmup": 1}
#: A version that is slower than the one before by more than this is not switched to.
MAX_SLOWDOWN = 2.0
#: Runs with the bundle's own runtime; the spec comes on stdin as plain numbers.
_MEASURE = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1] + "/runtime")
from ryot.edge.bundle import load_bundle
from ryot.edge.measure import build_spec, measure_rounds, record_environment
from ryot.errors import RyotError
asked = json.load(sys.stdin)
try:
    bundle = load_bundle(sys.argv[1])
    environment = record_environment()
    spec = build_spec(bundle, **asked["spec"])
    results = measure_rounds({bundle.name: spec}, rounds=asked["rounds"])[bundle.name]
except RyotError as error:
    sys.exit(f"Error: {error}")
json.dump({"environment": environment, "results": [dataclasses.asdict(r) for r in results]}, sys.stdout)
"""


def check_golden(command: list[str], what: str) -> str:
    """What `run.py --verify` says. Raises `FleetError` when it refuses, with its reason."""
    done = run([*command, "--verify"], timeout_s=CHECK_TIMEOUT_S)
    if done.returncode:
        raise FleetError(f"{what} does not verify: {error_of(done)}")
    return done.stdout.strip()


def measure(python: str, bundle: Path, spec: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """The environment and the raw results of a measurement by the bundle's own runtime."""
    asked = json.dumps({"spec": dict(spec), "rounds": rounds})
    limit = CHECK_TIMEOUT_S + rounds * float(spec.get("timeout_s", 120.0))
    done = run([python, "-B", "-s", "-c", _MEASURE, str(bundle)], timeout_s=limit, text=asked)
    if done.returncode:
        raise FleetError(f"it cannot be measured: {error_of(done)}")
    values = json.loads(done.stdout)
    assert isinstance(values, dict)
    return values


def summarize(results: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that a status shows: the median over processes of each one's median, and the highest peak."""
    figures: dict[str, float] = {}
    good = [r for r in results if r["ok"]]
    for name in ("ttft_ms", "decode_tok_s"):
        middles = [statistics.median(r[name]) for r in good if r[name]]
        if middles:
            figures[name] = statistics.median(middles)
    peaks = [r["peak_rss_bytes"] for r in good if r.get("peak_rss_bytes")]
    return figures | ({"peak_rss_bytes": float(max(peaks))} if peaks else {})


def describe_slowdown(before: Mapping[str, float], now: Mapping[str, float], factor: float) -> str:
    """Which figures of `summarize` are worse by more than `factor`; empty for none."""
    found = []
    for name, what, unit in (("ttft_ms", "TTFT", "ms"), ("decode_tok_s", "decode", "tok/s")):
        old, new = before.get(name), now.get(name)
        if old and new and (new / old if unit == "ms" else old / new) > factor:
            found.append(f"{what} {new:.3g} {unit}, {old:.3g} of the version that runs")
    return f"more than {factor:g} times slower: {'; '.join(found)}" if found else ""


def run_owner_command(command: str, what: str, wait_s: float = 0.0) -> None:
    """Run a command of the owner's; with `wait_s` again and again until it succeeds. Raises `FleetError`."""
    deadline = time.monotonic() + wait_s
    while True:
        done = run(["/bin/sh", "-c", command], timeout_s=60.0)
        if done.returncode == 0:
            return
        if time.monotonic() >= deadline:
            raise FleetError(f"the {what} command ended with code {done.returncode}: {error_of(done)}")
        time.sleep(0.5)
