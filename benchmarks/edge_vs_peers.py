"""How fast is the edge runtime beside torch, a plain ONNX export, onnxruntime-genai and llama.cpp, on the same weights?

    pip install ".[peers]"          in an environment of its own, and not with -e, which slows the start of every
                                    process; llama-cpp-python is compiled, for this CPU with CMAKE_ARGS=-DGGML_NATIVE=ON
                                    (its AMX products crash: there, off, and each AVX-512 flag of ggml on)
    python benchmarks/edge_vs_peers.py [--sizes S,M,L] [--rounds N | N,N,N] [--core C] [--models DIR]

Sizes S, M and L have 2.4, 33.6 and 134.5 million parameters. All engines run one thread on one core (the last one
allowed), each in a long-lived process of its own. They take turns in an order drawn anew for each round: untimed
tokens to fill the caches, then a prompt of 128 tokens and some greedy steps, each token handed to Python. Memory and
the start come from fresh processes. Ratios pair what was measured in the same round; the interval is at 98 %, over
rounds (ryot.report.stats).

Before that every float32 artifact must make torch's tokens, up to the first position where torch's own margin is below
the tolerance that torch's rounding error gives (ryot.deploy.verify); rows with an engine that does not are void.

Models are kept in DIR (default: RYOT_CACHE_DIR or ~/.cache/ryot, `edge_vs_peers/`) with the block sizes that the tool
chose for this CPU when it first ran; a new DIR chooses again. `--prepare` makes them and stops. The result is written
after each size to `benchmarks/results/DATE-edge_vs_peers-ISA.md` and `.json`. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from peer_models import ARTIFACTS, CHECK_TOKENS, GENAI_BLOCK, PROMPT_TOKENS, SIZES, draw_prompt
from peer_process import HERE, ONE_THREAD, Worker, WorkerError, turn
from peer_verdicts import KV8, judge, render
from record import RESULTS, describe_setting, write_result

PACKAGES = ("torch", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "gguf", "onnx", "numpy")
#: llama.cpp's own words for flash attention off and on.
FLASH = {0: "", 1: " flash"}
#: Sizes of arrays that bandwidth is measured on, beside the bytes that each artifact reads per step.
BANDWIDTH_BYTES = {"cache": 8 << 20, "memory": 256 << 20}
BATCH_SIZES, BATCH_PROMPT, BATCH_STEPS = (1, 16), 32, 24
DEPTHS, DEPTH_STEPS = (32, 480), 24
WARMUP_TURNS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is measured of a size."""

    rounds: int
    turns: int
    """Timed turns of an engine in a round."""
    steps: int
    slow_steps: int
    """Steps of torch without a cache, which computes the whole text for each."""
    warm_tokens: int
    """Prompt tokens of the untimed turn before."""
    cold_rounds: int
    cold_steps: int = 100
    """Tokens after the first one that peak memory is taken over."""


PLANS = {
    "S": Plan(rounds=20, turns=3, steps=96, slow_steps=8, warm_tokens=128, cold_rounds=5),
    "M": Plan(rounds=12, turns=1, steps=64, slow_steps=4, warm_tokens=128, cold_rounds=5),
    "L": Plan(rounds=7, turns=1, steps=32, slow_steps=2, warm_tokens=16, cold_rounds=3),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An artifact in an engine."""

    family: str
    """`ryot`, `torch`, `plain`, `genai` or `llama.cpp`."""
    artifact: str
    engine: str
    load: Mapping[str, Any]
    """The worker's request that loads it."""
    rounds: bool = True
    """Whether it takes turns; the rest is there for the check of tokens."""
    check: bool = False
    """Whether it computes in float32 and must make torch's tokens."""
    cold: bool = False
    """Whether its start and memory are measured."""
    slow: bool = False

    @property
    def name(self) -> str:
        return f"{self.artifact} / {self.engine}"


def list_cases(size: str, made: Mapping[str, Any], folder: Path) -> list[Case]:
    """Everything of a size that is compared."""
    cfg, decision, bundles = SIZES[size], made["decision"], made["bundles"]
    chosen = (decision["latency"], decision["one_session"])
    cases = []
    for artifact in ("fp32", *ARTIFACTS, *(artifact + KV8 for artifact in ARTIFACTS)):
        for via in ("capi",) if "+" in artifact or artifact.endswith(KV8) else ("capi", "python"):
            cases.append(
                Case(
                    family="ryot",
                    artifact=artifact,
                    engine=via,
                    load={"engine": "ryot", "bundle": bundles[artifact], "via": via},
                    rounds=artifact != "fp32" or via == "capi",
                    check=artifact == "fp32",
                    cold=artifact != "fp32" and ("+" not in artifact or artifact.removesuffix(KV8) in chosen),
                )
            )
    for cached in (False, True):
        load = {"engine": "torch", "checkpoint": str(folder / "checkpoint"), "cached": cached}
        artifact = "fp32, KV cache" if cached else "fp32, no cache"
        cases.append(
            Case(family="torch", artifact=artifact, engine="torch", load=load, check=True, cold=cached, slow=not cached)
        )
    load = {"engine": "plain", "path": made["plain"]}
    load |= {"layers": cfg.num_layers, "heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
    cases.append(
        Case(family="plain", artifact="fp32 plain export", engine="onnxruntime", load=load, check=True, cold=True)
    )
    cases += _genai_cases(made)
    for kind, path in made["gguf"].items():
        for flash, word in FLASH.items():
            load = {"engine": "llama.cpp", "path": path, "context": cfg.max_seq_len, "flash": flash}
            if kind != "F32":
                cases.append(
                    Case(family="llama.cpp", artifact=kind + word, engine="llama.cpp", load=load, cold=flash == 1),
                )
            elif not flash:
                load |= {"f32_cache": True}
                artifact = "F32, F32 cache"
                cases.append(
                    Case(family="llama.cpp", artifact=artifact, engine="llama.cpp", load=load, rounds=False, check=True)
                )
    return cases


def _genai_cases(made: Mapping[str, Any]) -> list[Case]:
    """genai at its default block size, and at ours where that is another one."""
    bundles, quantize = made["bundles"], made["decision"]["settings"]

    def case(artifact: str, bundle: str, **what: bool) -> Case:
        return Case(
            family="genai", artifact=artifact, engine="genai", load={"engine": "genai", "bundle": bundle}, **what
        )

    cases = [case("fp32", bundles["fp32"], rounds=False, check=True)]
    for precision in ("int8", "int4"):
        cases.append(case(f"{precision} block {GENAI_BLOCK}", bundles[f"genai {precision}"], cold=True))
        block = quantize[f"{precision}_block_size"]
        if block != GENAI_BLOCK:
            cases.append(case(f"{precision} block {block}", bundles[precision]))
    return cases


@dataclass
class SizeRun:
    """The measurement of one size; fields are what the result keeps."""

    size: str
    core: int
    plan: Plan
    folder: Path
    made: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Check, take turns, start cold; batches and depths where they are asked for."""
        cfg, begin, load_before = SIZES[self.size], time.monotonic(), os.getloadavg()[0]
        cases = list_cases(self.size, self.made, self.folder)
        if not self.made["gguf"]:
            self.notes.append("llama.cpp: skipped, the gguf package is not installed")
        check = self._check_tokens([a for a in cases if a.check])
        usable = [a for a in cases if a.name not in check or "wrong_at" in check[a.name]]
        rounds, bandwidth = self._take_rounds([a for a in usable if a.rounds])
        result = {
            "size": self.size,
            "parameters": self.made["parameters"],
            "config": dataclasses.asdict(cfg),
            "plan": dataclasses.asdict(self.plan),
            "prompt_tokens": PROMPT_TOKENS,
            "warmup_turns": WARMUP_TURNS,
            "decision": self.made["decision"],
            "read_bytes": self.made["read_bytes"],
            "reference": self.made["reference"],
            "check": check,
            "cases": {a.name: self._describe(a) | {"rounds": rounds[a.name]} for a in usable if a.name in rounds},
            "bandwidth": bandwidth,
            "bare_python_bytes": _measure_bare_python(),
            "cold": self._start_cold([a for a in usable if a.cold and (not a.rounds or a.name in rounds)]),
        }
        if self.size in ("S", "M"):
            result["batch"] = self._take_batches()
        if self.size == "M":
            result["depth"] = self._take_depths()
        folder = str(self.folder)
        result["notes"] = [note.replace(folder, self.size) for note in self.notes]
        result["wall_s"] = time.monotonic() - begin
        result["load_average"] = [load_before, os.getloadavg()[0]]
        return result

    def _describe(self, case: Case) -> dict[str, Any]:
        return {
            "family": case.family,
            "artifact": case.artifact,
            "engine": case.engine,
            "detail": self.details.get(case.name, ""),
            "steps": self.plan.slow_steps if case.slow else self.plan.steps,
        }

    def _check_tokens(self, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
        """How many tokens of each float32 artifact had to equal torch's, and where the first other one is, if any."""
        reference = self.made["reference"]
        expected, margins, tolerance = reference["tokens"], reference["margins"], reference["tolerance"]
        sure = next((i for i, margin in enumerate(margins) if margin <= tolerance), len(margins))
        found: dict[str, dict[str, Any]] = {}
        for case in cases:
            self._tell(f"tokens of {case.name}")
            with self._loaded({case.name: case.load}) as workers:
                request = turn([draw_prompt(SIZES[self.size], 0)], CHECK_TOKENS - 1)
                answer = self._ask(workers, case.name, request)
            if answer is None:
                found[case.name] = {"family": case.family, "missing": True}
                continue
            tokens = answer["tokens"]
            wrong = next((i for i in range(sure) if tokens[i] != expected[i]), None)
            found[case.name] = {"family": case.family, "compared": sure, "wrong_at": wrong, "tokens": tokens}
        return found

    def _take_rounds(self, cases: Sequence[Case]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Samples of each case by round, and the bandwidths of each round."""
        cfg, plan = SIZES[self.size], self.plan
        sizes = {**BANDWIDTH_BYTES, **self.made["read_bytes"]}
        by_name = {case.name: case for case in cases}
        samples: dict[str, list[Any]] = {case.name: [] for case in cases}
        bandwidths: list[list[float]] = []
        with (
            self._loaded({case.name: case.load for case in cases}) as workers,
            self._loaded({"reader": None}) as readers,
        ):
            for name in list(workers):
                for warmup in range(WARMUP_TURNS):
                    steps = plan.slow_steps if by_name[name].slow else plan.steps
                    self._ask(workers, name, turn([draw_prompt(cfg, 1 + warmup)], steps))
            for number in range(plan.rounds):
                self._tell(f"round {number + 1} of {plan.rounds}")
                order = [*sorted(workers), "reader"]
                random.Random(f"{self.size}/{number}").shuffle(order)
                for name in order:
                    if name == "reader":
                        answer = self._ask(readers, name, {"do": "bandwidth", "sizes": list(sizes.values())})
                        bandwidths.append(answer["bytes_per_s"] if answer else [])
                        continue
                    steps = plan.slow_steps if by_name[name].slow else plan.steps
                    prompts = [draw_prompt(cfg, 100 + number * plan.turns + i) for i in range(plan.turns)]
                    self._ask(workers, name, turn([prompts[0][: plan.warm_tokens]], min(4, steps)))
                    turns = [self._ask(workers, name, turn([prompt], steps)) for prompt in prompts]
                    if None not in turns:
                        samples[name].append(_columns(turns))
        whole = {name: found for name, found in samples.items() if len(found) == plan.rounds}
        return whole, {"bytes": sizes, "rounds": bandwidths}

    def _start_cold(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Start and peak memory of each case, a fresh process per round."""
        plan, prompt = self.plan, draw_prompt(SIZES[self.size], 0)
        found = {a.name: {**self._describe(a), "cold_start_ms": [], "peak_rss_bytes": []} for a in cases}
        for number in range(plan.cold_rounds):
            self._tell(f"fresh processes, round {number + 1} of {plan.cold_rounds}")
            order = sorted(cases, key=lambda a: a.name)
            random.Random(f"cold/{self.size}/{number}").shuffle(order)
            for case in order:
                worker = Worker(self.core)
                try:
                    answer = worker.ask({"do": "cold", "prompt": prompt, "steps": plan.cold_steps, **case.load})
                    for metric in ("cold_start_ms", "peak_rss_bytes"):
                        found[case.name][metric].append(answer[metric])
                except WorkerError as error:
                    self.notes.append(f"{case.name}: no fresh process, {error}")
                finally:
                    worker.close()
        return {name: values for name, values in found.items() if values["cold_start_ms"]}

    def _take_batches(self) -> dict[str, Any]:
        """Milliseconds per step of our artifacts for one and for many rows."""
        cfg = SIZES[self.size]
        loads = {
            f"{artifact} x {batch}": {
                "engine": "ryot",
                "bundle": self.made["bundles"][artifact],
                "via": "capi",
                "batch_size": batch,
            }
            for artifact in ("fp32", "int8-dyn", "int8", "int4", *(f"{f}{KV8}" for f in ("int8-dyn", "int8", "int4")))
            for batch in BATCH_SIZES
        }

        def request(name: str, number: int) -> dict[str, Any]:
            rows = int(name.rpartition(" ")[2])
            return turn([draw_prompt(cfg, 1000 * number + row, BATCH_PROMPT) for row in range(rows)], BATCH_STEPS)

        return self._interleave("batches", loads, request)

    def _take_depths(self) -> dict[str, Any]:
        """Milliseconds per token of int8 and int4 at two depths, with a float and an int8 cache."""
        cfg = SIZES[self.size]
        artifacts = ("int8", "int4", f"int8{KV8}", f"int4{KV8}")
        bundles = {
            artifact: {"engine": "ryot", "bundle": self.made["bundles"][artifact], "via": "capi"}
            for artifact in artifacts
        }
        # One process serves both depths of an artifact.
        found: dict[str, Any] = {f"{artifact} @ {depth}": [] for artifact in artifacts for depth in DEPTHS}
        with self._loaded(bundles) as workers:
            for number in range(-1, self.plan.rounds):
                self._tell(f"depths, round {number + 1} of {self.plan.rounds}")
                order = list(found)
                random.Random(f"depth/{number}").shuffle(order)
                for name in order:
                    artifact, _, depth = name.partition(" @ ")
                    request = turn([draw_prompt(cfg, 500 + number, int(depth))], DEPTH_STEPS)
                    answer = self._ask(workers, artifact, request)
                    if answer and number >= 0:
                        found[name].append(answer["token_ms"])
        return found

    def _interleave(self, what: str, loads: Mapping[str, Any], request: Any) -> dict[str, Any]:
        """Milliseconds per step of each load, one turn per round, after an untimed round."""
        found: dict[str, Any] = {name: [] for name in loads}
        with self._loaded(loads) as workers:
            for number in range(-1, self.plan.rounds):
                self._tell(f"{what}, round {number + 1} of {self.plan.rounds}")
                order = sorted(workers)
                random.Random(f"{what}/{number}").shuffle(order)
                for name in order:
                    answer = self._ask(workers, name, request(name, max(0, number)))
                    if answer and number >= 0:
                        found[name].append(answer["token_ms"])
        return found

    @contextlib.contextmanager
    def _loaded(self, loads: Mapping[str, Mapping[str, Any] | None]) -> Iterator[dict[str, Worker]]:
        """A worker for each load that can be had; what cannot is noted. None is a worker without an engine."""
        workers: dict[str, Worker] = {}
        try:
            for name, load in loads.items():
                worker = workers[name] = Worker(self.core)
                if load is not None and (answer := self._ask(workers, name, {"do": "load", **load})):
                    self.details[name] = answer["detail"]
            yield workers
        finally:
            for worker in workers.values():
                worker.close()

    def _ask(self, workers: dict[str, Worker], name: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The worker's answer; None, a note, and no further turns when it has none."""
        if name not in workers:
            return None
        try:
            return workers[name].ask(request)
        except WorkerError as error:
            self.notes.append(f"{name}: skipped, {error}")
            workers.pop(name).close()
            return None

    def _tell(self, what: str) -> None:
        print(f"{self.size}: {what}", file=sys.stderr, flush=True)


def _measure_bare_python() -> int:
    """Peak resident size of a Python that does nothing: what no engine can go below."""
    program = "print(next(int(s.split()[1]) for s in open('/proc/self/status') if s.startswith('VmHWM')))"
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout) * 1024


def _columns(turns: Sequence[Mapping[str, Any] | None]) -> dict[str, list[float]]:
    return {m: [round(t[m], 5) for t in turns if t is not None] for m in ("ttft_ms", "token_ms")}


def main() -> None:
    options = _parse()
    # The one who waits does so on another core, where there is one.
    os.sched_setaffinity(0, set(options.allowed) - {options.core} or {options.core})
    results: dict[str, Any] = {}
    for size in options.sizes:
        command = [sys.executable, str(HERE / "peer_models.py"), size, str(options.models), str(options.core)]
        subprocess.run(command, check=True, env=os.environ | ONE_THREAD)
        if options.prepare:
            continue
        folder = options.models / size
        made = json.loads((folder / "models.json").read_text())
        result = SizeRun(size, options.core, options.plans[size], folder, made).run()
        results[size] = result | {"rows": judge(result)}
        # Written after each size, so that an interrupt leaves what is done.
        values = {**describe_setting(), "core": options.core, "threads": 1, "packages": _versions(), "sizes": results}
        path = write_result("edge_vs_peers", values, render(values), options.output)
    if results:
        print(path.read_text())


def _parse() -> argparse.Namespace:
    allowed = sorted(os.sched_getaffinity(0))
    root = os.environ.get("RYOT_CACHE_DIR") or Path("~/.cache/ryot").expanduser()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="S,M,L", metavar="S,M,L", help="sizes, in this order (default all)")
    parser.add_argument("--rounds", default="", metavar="N", help="rounds, one number or one for each size")
    parser.add_argument("--core", type=int, default=allowed[-1], metavar="C", help="core that all engines share")
    parser.add_argument("--models", type=Path, default=Path(root) / "edge_vs_peers", metavar="DIR", help="models")
    parser.add_argument("--prepare", action="store_true", help="make the models and stop")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    options = parser.parse_args()
    options.allowed = allowed
    options.sizes = options.sizes.split(",")
    if unknown := [size for size in options.sizes if size not in SIZES]:
        parser.error(f"--sizes: {unknown[0]!r} is none of {', '.join(SIZES)}")
    if options.core not in allowed:
        parser.error(f"--core: {options.core} is none of the cores allowed, {allowed}")
    rounds = options.rounds.split(",") if options.rounds else []
    if rounds and (len(rounds) not in (1, len(options.sizes)) or not all(r.isdigit() and int(r) for r in rounds)):
        parser.error(f"--rounds: got {options.rounds!r}, expected one number above 0, or one for each size")
    options.plans = {
        size: _shortened(PLANS[size], int(rounds[i % len(rounds)])) if rounds else PLANS[size]
        for i, size in enumerate(options.sizes)
    }
    return options


def _shortened(plan: Plan, rounds: int) -> Plan:
    return dataclasses.replace(plan, rounds=rounds, cold_rounds=min(rounds, plan.cold_rounds))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


if __name__ == "__main__":
    main()
