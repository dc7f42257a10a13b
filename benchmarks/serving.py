"""How does `ryot-deploy serve` answer under load, beside llama-server and onnxruntime-genai, on the same weights?

    python benchmarks/serving.py --llama-cpp DIR [--smollm2 FILE.gguf] [--models M,SmolLM2] [--parts PART,...]
                                 [--engines NAME,...] [--cores 1,2] [--rounds N] [--soak N] [--minutes M] [--work DIR]

DIR holds llama-server and llama-quantize; benchmarks/README.md says how to build them. Servers are pinned to the first
core or the first two, the load to the last one; a server and its rivals are taken in turn in each round, in an order
drawn anew, each as a fresh process. Every result is kept in the work folder, so that a run that was stopped or ended
after --minutes goes on where it was. `--parts` takes some of

    streams   1, 4, 16 and 64 at once: tokens per second, time to the first token
    poisson   arrivals at random, at 50, 80 and 95 % of what `streams` found a server to be capable of
    shared    the same 16 at once with a prefix of 1,000 tokens in common
    http      one stream over HTTP against the engine in process
    prefix    time to the first token with 1,000 tokens known, against computed
    arrival   time between tokens of a running stream while a prompt of 2,000 tokens arrives
    batch     a file of requests against the same ones one by one
    json      answers that must be JSON against free ones
    start     from the start of the process until it is ready, against a bundle's cold start
    soak      many requests, a tenth of them cut off at random moments: failures, memory, rows

The CPU time of the server per token stands beside tokens per second: it tells servers apart on a machine that is not
quiet. All but `streams`, `poisson` and `shared` are of our server alone. The result is `results/DATE-serving-ISA.md`
and `.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, describe_setting, write_result
from serving_jobs import PARTS, Setting, engines_of, run_part
from serving_verdicts import render

HERE = Path(__file__).parent
MINUTES = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="where llama-server and llama-quantize lie")
    parser.add_argument("--smollm2", type=Path, metavar="FILE", help="SmolLM2-135M-Instruct as GGUF")
    parser.add_argument("--models", default="M,SmolLM2", metavar="LIST", help="default: M,SmolLM2")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="LIST", help="default: all")
    parser.add_argument("--engines", metavar="LIST", help="such as 'ryot int4,llama.cpp Q4_0'; default: all")
    parser.add_argument("--cores", default="1,2", metavar="LIST", help="cores of a server (default 1,2)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--soak", type=int, default=2000, metavar="N", help="requests of the soak (default 2,000)")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help="stop after (default 20)")
    parser.add_argument("--quick", action="store_true", help="a look, not to be quoted: fewer tokens and one round")
    parser.add_argument("--work", type=Path, default=Path("runs/serving"), metavar="DIR", help="models and samples")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    options = parser.parse_args()
    # Told to end, it ends the server that it has started too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parts, names = options.parts.split(","), options.models.split(",")
    if wrong := set(parts) - set(PARTS):
        parser.error(f"--parts: {min(wrong)} is none of {', '.join(PARTS)}")
    if "SmolLM2" in names and options.smollm2 is None and not (options.work / "SmolLM2/models.json").exists():
        parser.error("--smollm2: is needed for SmolLM2, or --models M")
    options.work.mkdir(parents=True, exist_ok=True)
    models = {name: _made(options, name) for name in names}
    rounds = 1 if options.quick else options.rounds
    samples = _take(options, parts, models, rounds)
    setting = describe_setting()
    raw = {**setting, "quick": options.quick, "samples": samples}
    print(write_result("serving", raw, render(setting, samples, quick=options.quick), options.output))


def _made(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What there is of a model, made where it is missing."""
    known = options.work / name / "models.json"
    if not known.exists() or "bundles" not in json.loads(known.read_text()):
        command = [sys.executable, str(HERE / "serving_models.py"), str(options.work), name, str(options.llama_cpp)]
        subprocess.run([*command, *([str(options.smollm2)] if options.smollm2 else [])], check=True)
    made: dict[str, Any] = json.loads(known.read_text())
    return made


def _take(
    options: argparse.Namespace, parts: list[str], models: dict[str, dict[str, Any]], rounds: int
) -> list[dict[str, Any]]:
    """All samples, those of earlier runs included."""
    began_s, samples = time.monotonic(), []
    only = None if options.engines is None else options.engines.split(",")
    each_cores = [int(cores) for cores in options.cores.split(",")]
    identity = hashlib.sha256(json.dumps([models, options.quick]).encode()).hexdigest()[:10]
    folder = options.work / f"samples-{identity}"
    folder.mkdir(exist_ok=True)
    jobs = [
        (number, cores, name, part, engine)
        for number in range(rounds)
        for cores in each_cores
        for name, made in models.items()
        for part in parts
        for engine in _shuffled(engines_of(part, made, options.llama_cpp), f"{number}{cores}{name}{part}")
        if only is None or engine.name in only
        # What is asked of our server alone is not asked for two cores too, and a long part is taken once.
        if part in ("streams", "poisson", "shared") or cores == each_cores[0]
        if number == 0 or part not in ("soak", "poisson")
    ]
    for position, (number, cores, name, part, engine) in enumerate(jobs):
        size = f"-{options.soak}" if part == "soak" else ""
        file = folder / f"{number}-{cores}-{name}-{part}{size}-{engine.name.replace(' ', '-')}.json"
        if not file.exists():
            if time.monotonic() - began_s > options.minutes * 60:
                _tell(f"{options.minutes:g} minutes are over with {len(jobs) - position} of {len(jobs)} jobs left")
                break
            _tell(f"{position + 1} of {len(jobs)}: round {number + 1}, {cores} cores, {name}, {part}, {engine.name}")
            setting = Setting(
                cores=list(range(cores)),
                load_core=(os.cpu_count() or 1) - 1,
                log=folder / "servers.log",
                quick=options.quick,
                soak=options.soak,
                capacity=_capacity(samples, cores, name, engine.name),
                model=name,
            )
            load = os.getloadavg()[0]
            found = run_part(part, engine, setting)
            head = {"round": number, "cores": cores, "model": name, "part": part, "engine": engine.name, "load": load}
            file.write_text(json.dumps(head | {"found": found}))
        samples.append(json.loads(file.read_text()))
    return samples


def _capacity(samples: list[dict[str, Any]], cores: int, name: str, engine: str) -> float | None:
    """Requests a second that a server managed at 16 at once."""
    for sample in samples:
        if (sample["part"], sample["cores"], sample["model"], sample["engine"]) == ("streams", cores, name, engine):
            return float(sample["found"]["16"]["requests_s"])
    return None


def _shuffled(values: list[Any], seed: str) -> list[Any]:
    return random.Random(seed).sample(values, len(values))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
