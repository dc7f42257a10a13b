"""One measurement of one point by `quality_speed.py`: a fresh process that holds the engine, pinned to its cores.

A `short` job takes the short prompt and the shallow depths, a `long` job the long prompt and the deep one, a `cold` job
the start and the memory. Ours and the builders' models run in `peer_worker.py`, which hands every token to Python;
llama.cpp runs in its own `llama-bench` and `llama-completion`, which hand it to nobody. All have an untimed prompt
before (ours has two: at the second our engine moves its memory to huge pages, once) and a cache allocated beforehand,
llama.cpp's in float16. Prompts of ours are text, llama-bench draws its own at random.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_process import Worker, WorkerError, turn
from quality_plan import Lengths

KINDS = ("short", "long", "cold")
#: Timed prompts of a short job, and untimed ones before any.
SHORT_PROMPTS, WARM_PROMPTS = 2, 2
#: How often the memory of a program is read while it runs.
POLL_S = 0.002
TIMEOUT_S = 600
#: Samples by series: `ttft@LENGTH` and `token@DEPTH` in milliseconds, `cold` in milliseconds, `rss` in bytes.
Series = dict[str, list[float]]


class JobError(Exception):
    """A measurement that gave nothing."""


def run_job(
    kind: str, point: Mapping[str, Any], lengths: Lengths, cores: Sequence[int], ids: Sequence[int], llama: Path
) -> tuple[Series, str]:
    """The samples of a job, and what the engine calls itself; `ids` are tokens to take prompts from."""
    if point["family"] == "llama.cpp":
        return _LlamaCpp(llama, point["path"], lengths, cores).run(kind, ids)
    try:
        return _run_worker(kind, point, lengths, cores, ids)
    except WorkerError as error:
        raise JobError(str(error)) from error


def longest(lengths: Lengths, kind: str) -> int:
    """Positions that a job needs."""
    if kind == "long":
        return max(lengths.long_prompt, lengths.long_depth + lengths.steps)
    if kind == "cold":
        return lengths.prompt + 1 + lengths.cold_steps
    return max(lengths.prompt + lengths.warm_steps, lengths.depths[1] + lengths.steps)


def _run_worker(
    kind: str, point: Mapping[str, Any], lengths: Lengths, cores: Sequence[int], ids: Sequence[int]
) -> tuple[Series, str]:
    prompt, needed = ids[: lengths.prompt], longest(lengths, kind)
    if point["family"] == "ryot":
        load = {"engine": "ryot", "bundle": point["path"], "via": "capi", "threads": len(cores)}
        load |= {} if kind == "cold" else {"reserve": needed}
    else:
        load = {"engine": "genai", "bundle": point["path"], "context": needed + 1, "threads": len(cores)}
    worker = Worker(*cores)
    try:
        if kind == "cold":
            answer = worker.ask({"do": "cold", "prompt": prompt, "steps": lengths.cold_steps, **load})
            return {"cold": [answer["cold_start_ms"]], "rss": [answer["peak_rss_bytes"]]}, answer["detail"]
        detail = worker.ask({"do": "load", **load})["detail"]
        for _ in range(WARM_PROMPTS):
            worker.ask(turn([prompt], lengths.warm_steps))
        found: Series = {}
        prompts, depths = [lengths.long_prompt], [lengths.long_depth]
        if kind == "short":
            prompts, depths = [lengths.prompt] * SHORT_PROMPTS, list(lengths.depths)
        for number, length in enumerate(prompts):
            answer = worker.ask(turn([ids[number : number + length]], 0))
            found.setdefault(f"ttft@{length}", []).append(answer["ttft_ms"])
        for depth in depths:
            answer = worker.ask(turn([ids[:depth]], lengths.steps))
            found.setdefault(f"token@{depth}", []).append(answer["token_ms"])
        return found, detail
    finally:
        worker.close()


class _LlamaCpp:
    """llama.cpp's own programs on one GGUF file."""

    def __init__(self, folder: Path, path: str, lengths: Lengths, cores: Sequence[int]):
        self._folder, self._path, self._lengths = folder, path, lengths
        self._pin = ["taskset", "-c", ",".join(map(str, cores))]
        self._threads = str(len(cores))

    def run(self, kind: str, ids: Sequence[int]) -> tuple[Series, str]:
        lengths = self._lengths
        if kind == "cold":
            return self._start_cold()
        if kind == "short":
            rows = self._bench("-p", str(lengths.prompt), "-n", "0", "-r", str(SHORT_PROMPTS))
            depths = ",".join(map(str, lengths.depths))
        else:
            # The short prompt goes first in place of a warm-up with the long one.
            both = f"{lengths.prompt},{lengths.long_prompt}"
            rows = self._bench("-p", both, "-n", "0", "-r", "1", "--no-warmup")[1:]
            depths = str(lengths.long_depth)
        rows += self._bench("-p", "0", "-n", str(lengths.steps), "-d", depths, "-r", "1")
        found: Series = {}
        for row in rows:
            times = [ns / 1e6 for ns in row["samples_ns"]]
            if row["n_gen"]:
                found[f"token@{row['n_depth']}"] = [ms / row["n_gen"] for ms in times]
            else:
                found[f"ttft@{row['n_prompt']}"] = times
        first = rows[0]
        return found, f"{first['model_type']}, K {first['type_k']}, V {first['type_v']}"

    def _bench(self, *arguments: str) -> list[dict[str, Any]]:
        program = [str(self._folder / "llama-bench"), "-m", self._path, "-t", self._threads, "-o", "json"]
        try:
            done = subprocess.run(
                [*self._pin, *program, *arguments], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise JobError(f"llama-bench took more than {TIMEOUT_S} s") from error
        if done.returncode:
            raise JobError(f"llama-bench: code {done.returncode}: {(done.stderr.splitlines() or ['nothing said'])[-1]}")
        return list(json.loads(done.stdout))

    def _start_cold(self) -> tuple[Series, str]:
        """From the process's start to its first byte of text, with a cache for what is needed; and VmHWM.

        The program reads its prompt as text, and encodes it: some words of which each is about one token.
        """
        lengths = self._lengths
        prompt = " the" * lengths.prompt
        program = [str(self._folder / "llama-completion"), "-m", self._path, "-p", prompt, "-t", self._threads]
        once = ["-n", str(1 + lengths.cold_steps), "-c", str(longest(lengths, "cold") + 8), "--temp", "0"]
        quiet = ["-no-cnv", "--no-display-prompt", "--no-warmup", "--ignore-eos", "--simple-io", "--offline"]
        begin = time.monotonic()
        process = subprocess.Popen(
            [*self._pin, *program, *once, *quiet],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        assert process.stdout is not None and process.stderr is not None
        errors: list[bytes] = []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # type: ignore[union-attr]
        reader.start()
        peak = _Peak(process.pid)
        first = os.read(process.stdout.fileno(), 1)
        cold_ms = (time.monotonic() - begin) * 1e3
        while os.read(process.stdout.fileno(), 1 << 16):
            pass
        code = process.wait(timeout=TIMEOUT_S)
        reader.join()
        peak_bytes = peak.end()
        text = b"".join(errors).decode(errors="replace")
        if code or not first or not peak_bytes:
            raise JobError(f"llama-completion: code {code}: {(text.splitlines() or ['nothing said'])[-1]}")
        info = next((line.partition("CPU : ")[2] for line in text.splitlines() if "system_info" in line), "")
        return {"cold": [cold_ms], "rss": [float(peak_bytes)]}, info.replace(" = 1", "").strip(" |")


class _Peak:
    """Reads VmHWM of a process until it is gone; it only grows, so the last reading is the peak."""

    def __init__(self, pid: int):
        self._status = Path(f"/proc/{pid}/status")
        self._peak = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while kib := self._read():
            self._peak = kib * 1024
            time.sleep(POLL_S)

    def _read(self) -> int:
        try:
            lines = self._status.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)

    def end(self) -> int:
        """The peak in bytes, once the process has ended."""
        self._thread.join()
        return self._peak
