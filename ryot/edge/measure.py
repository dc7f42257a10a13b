"""The measurement protocol: every figure comes from a fresh process that holds the edge runtime and nothing else.

- One process per case and round, pinned to its cores, held to its memory limit where the system allows.
- Rounds of all cases are interleaved: in a round the cases' processes run by turns, one measured run at a time, in an
  order drawn anew for each turn. A core that is slow for a second, as on shared machines, is slow for all of them.
- Warm-up until the times settle (`protocol.is_steady`), then a minimum count and a minimum time.
- The prompts are distinct and the same for all cases; nothing is cached between runs.
- Load, first token and warm figures are kept apart, and every raw sample is kept.
- A process that dies, times out or meets its limit is a result too: `ok=False` with the reason.

`python -m ryot.edge.measure` is the measuring process itself (see `probe`): spec on stdin, result on stdout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeVar

import ryot
from ryot.edge.bundle import Bundle
from ryot.edge.limits import MemoryCgroup, open_memory_cgroup
from ryot.edge.machine import describe_cpu
from ryot.edge.probe import SPAWNED_VARIABLE, main, read_peak_rss_bytes
from ryot.edge.protocol import MeasureResult, MeasureSpec, MemoryLimit
from ryot.mapping import read_mapping

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

#: What the child may be told by the environment; numpy's own threads would cost memory and time.
_CHILD_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def build_spec(bundle: Bundle, /, **overrides: Any) -> MeasureSpec:
    """The default measurement of a bundle: a prompt as long as those it carries, and decoding of such a length.

    That is `pp128` and `tg96 @ d32`, three quarters behind a quarter, for prompts of 128. Cores: the last ones of
    those allowed, as many as threads.
    """
    context = min([bundle.model.context_length, *map(len, bundle.prompts)])
    threads = overrides.get("threads", 1)
    defaults: dict[str, Any] = {
        "bundle": str(bundle.path),
        "prompt_tokens": context,
        "decode_tokens": context - context // 4,
        "decode_depth": context // 4,
        "cpus": tuple(sorted(os.sched_getaffinity(0))[-threads:]),
    }
    return MeasureSpec(**defaults | overrides)


def measure_rounds(
    specs: Mapping[K, MeasureSpec],
    *,
    rounds: int,
    seed: int = 0,
    on_result: Callable[[K, MeasureResult], None] | None = None,
) -> dict[K, list[MeasureResult]]:
    """The results of every case, one per round, measured in orders drawn from `seed`.

    A case is whatever tells one spec from another; its `str` is what the results show. `on_result` is called as they
    end. An interrupt ends the process in flight before it goes on up.
    """
    results: dict[K, list[MeasureResult]] = {case: [] for case in specs}
    for number in range(rounds):
        for case, result in _measure_round(specs, random.Random(f"{seed}/{number}")):
            results[case].append(dataclasses.replace(result, case=str(case), round=number))
            if on_result is not None:
                on_result(case, results[case][-1])
    return results


def measure_once(spec: MeasureSpec) -> MeasureResult:
    """Measure in a fresh process; whatever happens to it, there is a result."""
    [(_, result)] = _measure_round({"": spec}, random.Random())
    return result


def _measure_round(specs: Mapping[K, MeasureSpec], order: random.Random) -> Iterator[tuple[K, MeasureResult]]:
    """Each case's result, as they end; one process at a time does anything."""
    with contextlib.ExitStack() as stack:
        going: dict[K, _Child] = {}
        for case in order.sample(sorted(specs, key=str), len(specs)):
            child = stack.enter_context(_start(specs[case]))
            if (result := child.answer()) is None:
                going[case] = child
            else:
                yield case, result
        while going:
            for case in order.sample(sorted(going, key=str), len(going)):
                if (result := going[case].take_turn()) is not None:
                    del going[case]
                    yield case, result


class _Child:
    """A measuring process from the parent's side."""

    def __init__(
        self, spec: MeasureSpec, process: subprocess.Popen[bytes], errors: IO[bytes], cgroup: MemoryCgroup | None
    ):
        self._spec, self._process, self._errors, self._cgroup = spec, process, errors, cgroup
        self._left_s = spec.timeout_s
        self._write(dataclasses.replace(spec, turns=True).to_json())

    def take_turn(self) -> MeasureResult | None:
        """Let it do one measured run; its result when that was the last one."""
        self._write("")
        return self.answer()

    def answer(self) -> MeasureResult | None:
        """Wait until it wants a turn (None) or has ended, in whatever way."""
        assert self._process.stdout is not None
        begin = time.monotonic()
        line = _read_line(self._process.stdout, self._left_s)
        self._left_s -= time.monotonic() - begin
        if line == b"\n":
            return None
        spec = self._spec
        result = self._result(line)
        if spec.memory_limit_bytes is None:
            return result
        mode: MemoryLimit = "checked" if self._cgroup is None else "enforced"
        return dataclasses.replace(result, memory_limit=mode, memory_limit_bytes=spec.memory_limit_bytes)

    def _result(self, line: bytes | None) -> MeasureResult:
        spec, process, cgroup = self._spec, self._process, self._cgroup
        if line is None:
            process.kill()
            limit = f" under a memory limit of {cgroup.limit_bytes / 1e6:.1f} MB" if cgroup else ""
            return _failure(spec, f"timed out after {spec.timeout_s:g} s{limit}")
        outside = read_peak_rss_bytes(process.pid)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if line.endswith(b"\n"):
            result = read_mapping(MeasureResult, json.loads(line))
            if not result.ok:
                return _failure(spec, result.reason)
            return dataclasses.replace(result, peak_rss_outside_bytes=outside)
        code = process.wait()
        self._errors.seek(0)
        return _failure(spec, _explain(code, self._errors.read().decode(errors="replace"), cgroup))

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a process that is already dead is dealt with when it is read
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()


@contextlib.contextmanager
def _start(spec: MeasureSpec) -> Iterator[_Child]:
    """A measuring process, under the memory limit where the system allows one; it is gone when the block ends."""
    command = [sys.executable, "-P", "-m", "ryot.edge.probe"]
    with contextlib.ExitStack() as stack:
        cgroup = None
        if spec.memory_limit_bytes is not None and (cgroup := open_memory_cgroup(spec.memory_limit_bytes)):
            command = stack.enter_context(cgroup).wrap(command)
        errors = stack.enter_context(tempfile.TemporaryFile())
        process = stack.enter_context(_spawn(command, errors))
        yield _Child(spec, process, errors, cgroup)


@contextlib.contextmanager
def _spawn(command: list[str], errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the child away from the terminal's signals; it is gone when the block ends, however that happens."""
    root = str(Path(ryot.__file__).parent.parent)
    environment = os.environ | _CHILD_THREADS | {"PYTHONPATH": root, SPAWNED_VARIABLE: repr(time.monotonic())}
    if sys.dont_write_bytecode:  # a bundle's own run.py leaves no files in the bundle
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        try:
            child.wait(timeout=0 if sys.exc_info()[0] else 2)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def _read_line(pipe: IO[bytes], timeout_s: float) -> bytes | None:
    """A line, or what came before the pipe's end; None when neither came in time."""
    deadline = time.monotonic() + timeout_s
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(pipe.fileno(), 1 << 16)
        parts.append(part)
        if not part or part.endswith(b"\n"):
            return b"".join(parts)


def _failure(spec: MeasureSpec, reason: str) -> MeasureResult:
    return MeasureResult(
        ok=False,
        reason=reason,
        runs=1,
        threads=spec.threads,
        cpus=list(spec.cpus),
        batch_size=spec.batch_size,
        prompt_tokens=spec.prompt_tokens,
        decode_tokens=spec.decode_tokens,
        decode_depth=spec.decode_depth,
    )


def _explain(code: int, stderr: str, cgroup: MemoryCgroup | None) -> str:
    """Why a child ended without an answer, in one line."""
    if cgroup is not None and cgroup.was_killed():
        return f"killed at the memory limit of {cgroup.limit_bytes / 1e6:.1f} MB"
    last = stderr.strip().splitlines()[-1:] or ["it said nothing"]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"the measuring process ended with code {code}: {last[0]}"


def record_environment() -> dict[str, object]:
    """The machine and the software that figures were taken with."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": describe_cpu(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "governor": governor.read_text().strip() if governor.is_file() else None,
        "kernel": platform.release(),
        "system": platform.system(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("numpy", "onnxruntime", "tokenizers")},
        "ryot": ryot.__version__,
        "load_average": list(os.getloadavg()),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
