"""The measurement protocol: every figure comes from a fresh process that holds the edge runtime and nothing else.

- One process an arm and round, pinned to its cores, held to its memory limit where the system allows.
- Rounds of all arms are interleaved, in random order inside a round, so that a slow minute hits all of them.
- Warm-up until the times settle (`protocol.is_steady`), then a minimum count and a minimum time.
- The prompts are distinct and the same for all arms; nothing is cached between runs.
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
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import ryot
from ryot.edge.bundle import Bundle
from ryot.edge.limits import MemoryCgroup, open_memory_cgroup
from ryot.edge.machine import describe_cpu
from ryot.edge.probe import SPAWNED_VARIABLE, main, read_peak_rss_bytes
from ryot.edge.protocol import MeasureResult, MeasureSpec

log = logging.getLogger(__name__)

#: What the child may be told by the environment; numpy's own threads would cost memory and time.
_CHILD_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def build_spec(bundle: Bundle, /, **overrides: Any) -> MeasureSpec:
    """The default measurement of a bundle: a prompt that fills the context, three quarters decoded behind a quarter.

    That is `pp128` and `tg96 @ d32` for a context of 128. Cores: the last ones of those allowed, as many as threads.
    """
    context = bundle.model.context_length
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
    specs: Mapping[str, MeasureSpec],
    *,
    rounds: int = 3,
    seed: int = 0,
    on_result: Callable[[MeasureResult], None] | None = None,
) -> list[MeasureResult]:
    """Measure every arm once a round, in an order drawn from `seed`; results come in the order they were taken.

    An interrupt ends the process in flight before it goes on up.
    """
    results = []
    for number in range(rounds):
        arms = sorted(specs)
        random.Random(f"{seed}/{number}").shuffle(arms)
        for arm in arms:
            result = dataclasses.replace(measure_once(specs[arm]), arm=arm, round=number)
            results.append(result)
            if on_result is not None:
                on_result(result)
    return results


def measure_once(spec: MeasureSpec) -> MeasureResult:
    """Measure in a fresh process; whatever happens to it, there is a result."""
    with contextlib.ExitStack() as stack:
        cgroup = None
        if spec.memory_limit_bytes is not None:
            cgroup = open_memory_cgroup(spec.memory_limit_bytes)
            if cgroup is not None:
                stack.enter_context(cgroup)
        result = _run_child(spec, cgroup)
        if spec.memory_limit_bytes is None:
            return result
        return dataclasses.replace(
            result, memory_limit="checked" if cgroup is None else "enforced", memory_limit_bytes=spec.memory_limit_bytes
        )


def _run_child(spec: MeasureSpec, cgroup: MemoryCgroup | None) -> MeasureResult:
    command = [sys.executable, "-P", "-m", "ryot.edge.probe"]
    if cgroup is not None:
        command = cgroup.wrap(command)
    with tempfile.TemporaryFile() as errors, _spawn(command, errors) as child:
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # a child that is already dead is dealt with below
            child.stdin.write(spec.to_json().encode() + b"\n")
            child.stdin.flush()
        line = _read_line(child.stdout, spec.timeout_s)
        if line is None:
            child.kill()
            limit = f" under a memory limit of {cgroup.limit_bytes / 1e6:.1f} MB" if cgroup else ""
            return _failure(spec, f"timed out after {spec.timeout_s:g} s{limit}")
        outside = read_peak_rss_bytes(child.pid)
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        if line.endswith(b"\n"):
            result = MeasureResult.from_mapping(json.loads(line))
            if not result.ok:
                return _failure(spec, result.reason)
            return dataclasses.replace(result, peak_rss_outside_bytes=outside)
        code = child.wait()
        errors.seek(0)
        return _failure(spec, _explain(code, errors.read().decode(errors="replace"), cgroup))


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


def record_environment() -> dict[str, Any]:
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
