"""What `serving.py` does with one server: each part is a load on a fresh process and the figures that it gave."""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from serving_servers import ONE_THREAD, RYOT, Served, serve_llama, serve_ryot

HERE = Path(__file__).parent
AT_ONCE = (1, 4, 16, 64)
SHARES = (0.5, 0.8, 0.95)
PROMPT_TOKENS, PREFIX_TOKENS, LONG_TOKENS = 128, 1000, 2000
#: A context that holds a shared prefix, a prompt and its answer.
CONTEXT = 2304
Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Engine:
    """A server with a model."""

    name: str
    kind: str
    """`ryot`, `llama` or `genai`."""
    path: str
    program: Path | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """How a part is run."""

    cores: list[int]
    load_core: int
    log: Path
    quick: bool
    soak: int
    capacity: float | None
    model: str

    @property
    def tokens(self) -> int:
        """Tokens of an answer."""
        return 32 if self.quick or self.model != "M" else 128

    def prompt(self, number: int, length: int = PROMPT_TOKENS) -> list[int]:
        """Prompt `number`: ids that every vocabulary has, none of them special."""
        found: list[int] = np.random.default_rng((11, number)).integers(300, 8000, length).tolist()
        return found


def engines_of(part: str, made: dict[str, Any], llama: Path | None) -> list[Engine]:
    """Who takes part: our bundles, and where others can be compared those of llama.cpp and genai."""
    ours = [Engine(f"ryot {name}", "ryot", path) for name, path in made["bundles"].items()]
    if part == "batch":
        return ours
    if part not in ("streams", "poisson", "shared"):
        return ours[:1]
    server = None if llama is None else llama / "llama-server"
    theirs = [Engine(f"llama.cpp {kind}", "llama", path, server) for kind, path in made["gguf"].items() if server]
    genai = [Engine(f"genai {made['genai_of']}", "genai", made["bundles"][made["genai_of"]])]
    return [*ours, *theirs, *(genai if part == "streams" else [])]


def run_part(part: str, engine: Engine, setting: Setting) -> Found:
    """The figures of a part."""
    return PARTS[part](engine, setting)


@contextlib.contextmanager
def served(engine: Engine, setting: Setting, *, rows: int, more: Sequence[str] = ()) -> Iterator[Served]:
    if engine.kind == "llama":
        assert engine.program is not None
        # A slot's share of the context has to hold what it is asked.
        server = serve_llama(
            engine.program,
            engine.path,
            setting.cores,
            rows=rows,
            context=CONTEXT if rows <= 16 else 512,
            log=setting.log,
        )
    else:
        server = serve_ryot(engine.path, setting.cores, rows=rows, log=setting.log, more=more)
    with server as found:
        yield found


def body(prompt: Sequence[int], tokens: int, **more: object) -> Found:
    """A request that both servers understand."""
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **stream, **more}


def send(server: Served, setting: Setting, requests: Sequence[Found], **job: object) -> list[Found]:
    """What the load process saw."""
    told = {
        "port": server.port,
        "path": "/v1/completions",
        "requests": list(requests),
        "core": setting.load_core,
        **job,
    }
    run = subprocess.run(
        [sys.executable, str(HERE / "serving_load.py")],
        input=json.dumps(told).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    found: list[Found] = json.loads(run.stdout)
    return found


def summarize(found: Sequence[Found], cpu_s: float) -> Found:
    """Rates and times of answers."""
    good = [one for one in found if one["usage"] and not one.get("error")]
    tokens = sum(one["usage"]["completion_tokens"] for one in good)
    wall_s = max(one["ended_s"] for one in found) - min(one["sent_s"] for one in found)
    first = [one["events_s"][0] - one["sent_s"] for one in good if one["events_s"]]
    return {
        "tokens": tokens,
        "failed": len(found) - len(good),
        "wall_s": wall_s,
        "tok_s": tokens / wall_s,
        "requests_s": len(good) / wall_s,
        "cpu_ms_per_token": 1e3 * cpu_s / max(tokens, 1),
        "ttft_ms": [round(1e3 * value, 3) for value in first],
    }


def load(server: Served, setting: Setting, requests: Sequence[Found], **job: object) -> Found:
    """Send requests and sum up what came of them."""
    before_s = server.cpu_s()
    found = send(server, setting, requests, **job)
    return summarize(found, server.cpu_s() - before_s)


def streams(engine: Engine, setting: Setting) -> Found:
    if engine.kind == "genai":
        return genai_streams(engine, setting)
    found: Found = {}
    for at_once in AT_ONCE[: 3 if setting.quick else 4]:
        count = max(3, 2 * at_once) if at_once < 64 else 64
        with served(engine, setting, rows=at_once) as server:
            warm = [{"body": body(setting.prompt(10_000 + i), 4)} for i in range(min(at_once, 2))]
            send(server, setting, warm, at_once=1)
            requests = [{"body": body(setting.prompt(at_once * 100 + i), setting.tokens)} for i in range(count)]
            found[str(at_once)] = load(server, setting, requests, at_once=at_once)
    return found


def genai_streams(engine: Engine, setting: Setting) -> Found:
    """genai has no server: batches of prompts that begin and end together, in a process of their own."""
    found: Found = {}
    for at_once in (1, 4, 16):
        command = ["taskset", "-c", ",".join(map(str, setting.cores)), sys.executable, str(HERE / "serving_genai.py")]
        prompts = [setting.prompt(at_once * 100 + i) for i in range(at_once)]
        told = {"path": engine.path, "threads": len(setting.cores), "prompts": prompts, "tokens": setting.tokens}
        run = subprocess.run(command, input=json.dumps(told).encode(), capture_output=True, check=False)
        try:
            found[str(at_once)] = json.loads(run.stdout)
        except ValueError:
            reason = run.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
            return found | {"missing": reason[0][:200]}
    return found


def poisson(engine: Engine, setting: Setting) -> Found:
    if setting.capacity is None:
        return {"missing": "`streams` has not said what it is capable of"}
    found: Found = {}
    with served(engine, setting, rows=16) as server:
        send(server, setting, [{"body": body(setting.prompt(10_000), 4)}], at_once=1)
        for number, share in enumerate(SHARES):
            rate = share * setting.capacity
            count = max(8, min(60, int(rate * (5 if setting.quick else 15))))
            arrivals = np.cumsum(np.random.default_rng(5).exponential(1 / rate, count)).tolist()
            asked = range(5000 + 100 * number, 5000 + 100 * number + count)
            requests = [{"body": body(setting.prompt(i), setting.tokens)} for i in asked]
            found[f"{share:.0%}"] = load(server, setting, requests, arrivals_s=arrivals) | {"rate": rate}
    return found


def shared(engine: Engine, setting: Setting) -> Found:
    prefix = setting.prompt(77, PREFIX_TOKENS)
    with served(engine, setting, rows=16) as server:
        send(server, setting, [{"body": body([*prefix, 400], 4)}], at_once=1)
        requests = [{"body": body([*prefix, *setting.prompt(i, 28)], setting.tokens)} for i in range(32)]
        return {"16": load(server, setting, requests, at_once=16)}


def http(engine: Engine, setting: Setting) -> Found:
    tokens = 100 if setting.quick else 400
    requests = [{"body": body(setting.prompt(i), tokens)} for i in range(3)]
    # Without what it knows of prompts: the engine beside it computes each anew.
    with served(engine, setting, rows=1, more=("--prefix-cache", "0")) as server:
        send(server, setting, requests[:1], at_once=1)
        over = [_pace(one) for one in send(server, setting, requests, at_once=1)]
        before_s = server.cpu_s()
        send(server, setting, requests, at_once=1)
        cpu_s = server.cpu_s() - before_s
    told = {"path": engine.path, "threads": len(setting.cores), "tokens": tokens}
    told |= {"prompts": [setting.prompt(i) for i in range(3)]}
    run = subprocess.run(
        ["taskset", "-c", ",".join(map(str, setting.cores)), sys.executable, str(HERE / "serving_engine.py")],
        input=json.dumps(told).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    inside = json.loads(run.stdout)
    return {"http_tok_s": over, "engine_tok_s": inside["tok_s"], "http_cpu_s": cpu_s, "engine_cpu_s": inside["cpu_s"]}


def _pace(one: Found) -> float:
    """Tokens a second of a stream behind its first one."""
    return float((one["usage"]["completion_tokens"] - 1) / (one["ended_s"] - one["events_s"][0]))


def prefix(engine: Engine, setting: Setting) -> Found:
    found: Found = {"computed_ms": [], "cached_ms": [], "cached_tokens": []}
    with served(engine, setting, rows=1) as server:
        send(server, setting, [{"body": body(setting.prompt(1), 4)}], at_once=1)
        for number in range(3 if setting.quick else 6):
            start = setting.prompt(300 + number, PREFIX_TOKENS)
            for kind in ("computed_ms", "cached_ms"):
                end = setting.prompt(600 + len(kind) + number, 16)
                (one,) = send(server, setting, [{"body": body([*start, *end], 2)}], at_once=1)
                found[kind].append(1e3 * (one["events_s"][0] - one["sent_s"]))
            found["cached_tokens"].append(one["usage"]["prompt_tokens_details"]["cached_tokens"])
    return found


def arrival(engine: Engine, setting: Setting) -> Found:
    """Gaps between the events of one long stream, alone and while long prompts arrive."""
    tokens = 600 if setting.quick or setting.model != "M" else 1500
    long = [{"body": body(setting.prompt(900 + i, LONG_TOKENS), 1)} for i in range(4)]
    found: Found = {}
    with served(engine, setting, rows=4, more=("--prefix-cache", "0")) as server:
        send(server, setting, [{"body": body(setting.prompt(1, 300), 8)}] * 2, at_once=1)
        for name, others in (("alone", []), ("with", long)):
            stream = {"body": body(setting.prompt(2), tokens)}
            # The prompts come one after the other from 0.3 s on.
            arrivals = [0.0, *(0.3 + 1.5 * i for i in range(len(others)))]
            one = send(server, setting, [stream, *others], arrivals_s=arrivals, keep_events=True)
            events = np.asarray(one[0]["events_s"])
            if others:
                windows = [(o["sent_s"], o["ended_s"]) for o in one[1:]]
                inside = [any(a <= at <= b for a, b in windows) for at in events[1:]]
                gaps = np.diff(events)[np.asarray(inside, bool)]
            else:
                gaps = np.diff(events)
            found[name] = {
                "count": int(gaps.size),
                "p50_ms": float(1e3 * np.quantile(gaps, 0.5)) if gaps.size else None,
                "p99_ms": float(1e3 * np.quantile(gaps, 0.99)) if gaps.size else None,
                "max_ms": float(1e3 * gaps.max()) if gaps.size else None,
            }
    return found


def batch(engine: Engine, setting: Setting) -> Found:
    count = 16 if setting.quick else 48
    lines = []
    for number in range(count):
        tokens = random.Random(number).choice((setting.tokens // 2, setting.tokens, 2 * setting.tokens))
        asked = {k: v for k, v in body(setting.prompt(2000 + number), tokens).items() if not k.startswith("stream")}
        lines.append({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": asked})
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [*RYOT, "batch", engine.path, str(source), "-o", str(target), "--threads", str(len(setting.cores))]
        pinned = ["taskset", "-c", ",".join(map(str, setting.cores)), *command]
        run = subprocess.run(pinned, capture_output=True, text=True, check=True, env={**_environment()})
        told = run.stderr.strip().splitlines()[-1]
        answers = [json.loads(line) for line in target.read_text().splitlines()]
    batch_tok_s = float(told.rsplit(",", 1)[1].split()[0])
    tokens = sum(one["response"]["body"]["usage"]["completion_tokens"] for one in answers)
    with served(engine, setting, rows=1, more=("--prefix-cache", "0")) as server:
        single = [{"body": line["body"] | {"stream": False}} for line in lines[: count // 3]]
        one_by_one = load(server, setting, single, at_once=1)
    return {"batch_tok_s": batch_tok_s, "tokens": tokens, "single_tok_s": one_by_one["tok_s"]}


def json_answers(engine: Engine, setting: Setting) -> Found:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 3, "maxItems": 8},
            "score": {"type": "number"},
        },
        "required": ["name", "tags", "score"],
        "additionalProperties": False,
    }
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "item", "schema": schema}}}
    found: Found = {"free": [], "json": [], "valid": 0, "ended": 0}
    with served(engine, setting, rows=1) as server:
        send(server, setting, [{"body": body(setting.prompt(1), 4) | form}], at_once=1)
        for number in range(4 if setting.quick else 8):
            asked = body(setting.prompt(number), 96) | {"temperature": 0.8, "seed": number}
            (constrained,) = send(server, setting, [{"body": asked | form | {"ignore_eos": False}}], at_once=1)
            tokens = constrained["usage"]["completion_tokens"]
            (free,) = send(server, setting, [{"body": asked | {"max_tokens": tokens}}], at_once=1)
            if tokens > 8:
                found["json"].append(_pace(constrained))
                found["free"].append(_pace(free))
    return found


def start(engine: Engine, setting: Setting) -> Found:
    found: Found = {"ready_s": [], "cold_s": []}
    for _ in range(3):
        with served(engine, setting, rows=4) as server:
            found["ready_s"].append(server.ready_s)
        began_s = time.perf_counter()
        command = ["taskset", "-c", ",".join(map(str, setting.cores)), sys.executable, f"{engine.path}/run.py"]
        subprocess.run([*command, "--prompt", "a", "--max-new-tokens", "1"], check=True, stdout=subprocess.DEVNULL)
        found["cold_s"].append(time.perf_counter() - began_s)
    return found


def soak(engine: Engine, setting: Setting) -> Found:
    """Requests of mixed lengths, a tenth of them cut off; memory after the first tenth and at the end."""
    rng = random.Random(3)
    requests: list[Found] = []
    for number in range(setting.soak):
        tokens = rng.randrange(1, 24)
        asked = body(setting.prompt(number % 997, rng.randrange(1, 60)), tokens)
        if rng.random() < 0.3:
            asked |= {"temperature": 0.8, "seed": number, "n": rng.randrange(1, 4)}
        request: Found = {"body": asked}
        if rng.random() < 0.1:
            request["cancel_after"] = rng.randrange(1, tokens + 1)
        requests.append(request)
    rss, failed, cancelled = [], 0, 0
    # A cache that is full before memory is looked at, so that what it may hold is not taken for growth.
    with served(engine, setting, rows=16, more=("--prefix-cache", "16")) as server:
        chunk = max(1, setting.soak // 10)
        for at in range(0, len(requests), chunk):
            found = send(server, setting, requests[at : at + chunk], at_once=32)
            cancelled += sum(bool(one.get("cancelled")) for one in found)
            failed += sum(not one.get("cancelled") and not one.get("done") for one in found)
            rss.append(server.rss_bytes())
        for _ in range(100):
            lines = server.get("/metrics")[1].splitlines()
            state = {
                line.partition("{")[0]: float(line.rpartition(" ")[2])
                for line in lines
                if line.startswith("vllm:num_requests_")
            }
            running = {name: value for name, value in state.items() if not name.startswith("#")}
            if not any(running.values()):
                break
            time.sleep(0.05)
        (last,) = send(server, setting, [{"body": body(setting.prompt(1), 8)}], at_once=1)
    return {
        "requests": len(requests),
        "failed": failed,
        "cancelled": cancelled,
        "rss_mb": [round(value / 1e6, 1) for value in rss],
        "rows_held": running,
        "answers_after": bool(last.get("done")),
    }


def _environment() -> dict[str, str]:
    import os

    return os.environ | ONE_THREAD


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


PARTS: dict[str, Callable[[Engine, Setting], Found]] = {
    "streams": streams,
    "poisson": poisson,
    "shared": shared,
    "http": http,
    "prefix": prefix,
    "arrival": arrival,
    "batch": batch,
    "json": json_answers,
    "start": start,
    "soak": soak,
}
