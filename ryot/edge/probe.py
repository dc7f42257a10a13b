"""The measuring process: `python -m ryot.edge.probe` reads a spec on stdin, measures one case, answers on stdout.

It imports what the device would: an engine, and tokenizers where text is timed too. If asked to run by turns, it says
an empty line before each measured run and waits for one. After the answer it waits for the end of stdin, so that its
parent can look at its memory from outside while it still exists.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ryot.edge.protocol import MAX_WARMUP_RUNS, MAX_WARMUP_S, MeasureResult, MeasureSpec, is_steady, parse_spec
from ryot.errors import MeasureError, RyotError
from ryot.mapping import to_mapping

if TYPE_CHECKING:
    from ryot.edge.bundle import Bundle
    from ryot.edge.engine import Engine
    from ryot.edge.tokenizer import Tokenizer

#: Set by the parent: when it started this process, on the clock that both share.
SPAWNED_VARIABLE = "RYOT_SPAWNED_AT_S"
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Read the spec, measure, answer."""
    _die_with_parent()
    try:
        spec = parse_spec(sys.stdin.readline())
        result = measure_here(spec)
    except RyotError as error:
        result = MeasureResult(ok=False, reason=str(error))
    except MemoryError:
        result = MeasureResult(ok=False, reason="out of memory")
    sys.stdout.write(json.dumps(to_mapping(result, keep_none=True)) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


def measure_here(spec: MeasureSpec) -> MeasureResult:
    """Measure `spec` in this process, which should be fresh. Raises `MeasureError` or `BundleError`."""
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    # Threads inherit the cores of the thread that starts them, so this comes before any library can start one.
    _pin(spec.cpus)
    load_before, calibration_before = os.getloadavg()[0], calibrate_ms()

    begin = time.perf_counter()
    from ryot.edge.bundle import MANIFEST_NAME, hash_file, load_bundle
    from ryot.edge.engines import open_engine

    importlib.import_module("ryot.edge.session" if spec.engine == "python" else "ryot.edge.capi")
    imported = time.perf_counter()
    bundle = load_bundle(spec.bundle, verify=False)
    _check_fits(spec, bundle)
    sizes = {"threads": spec.threads, "batch_size": spec.batch_size, "max_len": _longest(spec)}
    decoder = open_engine(bundle, engine=spec.engine, **sizes)
    loaded = time.perf_counter()
    case = _Case(spec, bundle, decoder)
    first = time.perf_counter()
    decoder.prefill(case.prompts(0, spec.prompt_tokens))
    int(decoder.next_token[0])
    answered = time.perf_counter()
    spawned_at = os.environ.get(SPAWNED_VARIABLE)
    cold_start_s = time.monotonic() - float(spawned_at) if spawned_at else None
    if spec.end_to_end:
        case.load_tokenizer()
    gc.collect()
    gc.disable()
    warmup = _warm_up(case)
    runs = _repeat(case)
    gc.enable()
    calibration_after = calibrate_ms()
    peak = read_peak_rss_bytes("self")
    return MeasureResult(
        ok=True,
        engine=decoder.name,
        precision=bundle.precision,
        import_ms=_ms(imported - begin),
        load_ms=_ms(loaded - imported),
        first_ttft_ms=_ms(answered - first),
        cold_start_ms=None if cold_start_s is None else _ms(cold_start_s),
        tokenizer_load_ms=case.tokenizer_load_ms,
        ttft_ms=[r.ttft_ms for r in runs],
        e2e_ttft_ms=[r.e2e_ttft_ms for r in runs if r.e2e_ttft_ms is not None],
        decode_tok_s=[r.decode_tok_s for r in runs if r.decode_tok_s is not None],
        token_ms=[r.token_ms for r in runs if r.token_ms],
        peak_rss_bytes=peak,
        warmup_runs=len(warmup),
        steady=is_steady(warmup),
        runs=len(runs),
        runs_ok=len(runs),
        calibration_ms=[calibration_before, calibration_after],
        load_average=[load_before, os.getloadavg()[0]],
        threads=spec.threads,
        cpus=sorted(os.sched_getaffinity(0)),
        batch_size=spec.batch_size,
        prompt_tokens=spec.prompt_tokens,
        decode_tokens=spec.decode_tokens,
        decode_depth=spec.decode_depth,
        versions=_versions(decoder),
        manifest_sha256=hash_file(bundle.path / MANIFEST_NAME),
        started_at=started_at,
    )


class _Run:
    """The times of one run: a prompt answered, then tokens decoded."""

    __slots__ = ("decode_tok_s", "e2e_ttft_ms", "token_ms", "ttft_ms")

    def __init__(self, ttft_ms: float, e2e_ttft_ms: float | None, token_ms: list[float], rows: int):
        self.ttft_ms = ttft_ms
        self.e2e_ttft_ms = e2e_ttft_ms
        self.token_ms = token_ms
        self.decode_tok_s = rows * len(token_ms) / sum(token_ms) * 1e3 if token_ms else None


class _Case:
    """A loaded decoder and the prompts it is run with; end-of-text is ignored, so all runs have the same length."""

    def __init__(self, spec: MeasureSpec, bundle: Bundle, decoder: Engine):
        self.spec = spec
        self._bundle = bundle
        self._decoder = decoder
        self._prompts = [list(p[: _longest(spec)]) for p in _prompts(spec, bundle)]
        self._tokenizer: Tokenizer | None = None
        self._texts: list[str] = []
        self.tokenizer_load_ms: float | None = None

    def prompts(self, run: int, length: int) -> list[list[int]]:
        """The next prompts in turn, one per row."""
        first = run * self.spec.batch_size
        return [self._prompts[(first + row) % len(self._prompts)][:length] for row in range(self.spec.batch_size)]

    def load_tokenizer(self) -> None:
        from ryot.edge.tokenizer import load_tokenizer

        begin = time.perf_counter()
        self._tokenizer = load_tokenizer(self._bundle)
        self.tokenizer_load_ms = _ms(time.perf_counter() - begin)
        self._texts = [self._tokenizer.decode(p[: self.spec.prompt_tokens]) for p in self._prompts]

    def run(self, run: int) -> _Run:
        """Answer a prompt, then decode from another depth."""
        spec, decoder = self.spec, self._decoder
        ids_BS = self.prompts(run, spec.prompt_tokens)
        if spec.turns:
            # Another process ran meanwhile: this one's weights come back into the cache untimed.
            decoder.prefill(ids_BS)
        clock = time.perf_counter_ns
        e2e_ms = None
        if self._tokenizer is None:
            begin = clock()
            decoder.prefill(ids_BS)
            int(decoder.next_token[0])
            ttft_ms = (clock() - begin) / 1e6
        else:
            # The text is tokenized for its time; what is run are the ids it came from, which have the exact length.
            texts = [self._texts[(run * spec.batch_size + r) % len(self._texts)] for r in range(spec.batch_size)]
            arrived = clock()
            for text in texts:
                self._tokenizer.encode(text)
            begin = clock()
            decoder.prefill(ids_BS)
            token = int(decoder.next_token[0])
            answered = clock()
            self._tokenizer.decode([token])
            e2e_ms = round((clock() - arrived) / 1e6, 4)
            ttft_ms = (answered - begin) / 1e6
        token_ms: list[float] = []
        if spec.decode_tokens:
            decoder.prefill(self.prompts(run, spec.decode_depth))
            step = decoder.step
            ticks = [clock()]
            for _ in range(spec.decode_tokens):
                step()
                ticks.append(clock())
            token_ms = [round((b - a) / 1e6, 4) for a, b in itertools.pairwise(ticks)]
        return _Run(round(ttft_ms, 4), e2e_ms, token_ms, spec.batch_size)


def _warm_up(case: _Case) -> list[tuple[float, float]]:
    """Run until the times are steady, at least `warmup` and at most `MAX_WARMUP_RUNS` times; returns the times.

    On a machine that is never steady a large model ends it after `MAX_WARMUP_S`.
    """
    times: list[tuple[float, float]] = []
    end = time.monotonic() + MAX_WARMUP_S
    while len(times) < case.spec.warmup or (
        not is_steady(times) and len(times) < MAX_WARMUP_RUNS and time.monotonic() < end
    ):
        run = case.run(len(times))
        times.append((run.ttft_ms, sum(run.token_ms)))
    return times


def _repeat(case: _Case) -> list[_Run]:
    """Run for the minimum count and the minimum time, of which waiting for a turn is no part."""
    runs: list[_Run] = []
    spent_s = 0.0
    while len(runs) < case.spec.min_runs or spent_s < case.spec.min_time_s:
        if case.spec.turns:
            _await_turn()
        begin = time.perf_counter()
        runs.append(case.run(len(runs)))
        spent_s += time.perf_counter() - begin
    return runs


def _await_turn() -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()
    if not sys.stdin.readline():
        raise MeasureError("the parent has closed stdin while a measurement was waiting for its turn")


def calibrate_ms() -> float:
    """The median time of a fixed piece of integer work in Python, about 2 ms; tells how fast this core is now."""
    times = []
    for _ in range(5):
        begin, value = time.perf_counter_ns(), 1
        for _ in range(20_000):
            value = (value * 1_103_515_245 + 12_345) & 0x7FFF_FFFF
        times.append(time.perf_counter_ns() - begin)
    return round(sorted(times)[2] / 1e6, 4)


def read_peak_rss_bytes(process: int | str) -> int | None:
    """The largest resident size that a process had so far: VmHWM. None once it is gone.

    Its end is not in it, for which some 4 MB of onnxruntime's code come back into memory.
    Not `ru_maxrss`: that survives fork and exec, so a child of a large parent would report its parent's size.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _versions(decoder: Engine) -> dict[str, str]:
    """Of what this process runs on; numpy is there only where the engine loaded it."""
    versions = {"python": sys.version.split()[0], "onnxruntime": decoder.onnxruntime_version}
    if "numpy" in sys.modules:
        versions["numpy"] = sys.modules["numpy"].__version__
    return versions


def _longest(spec: MeasureSpec) -> int:
    return max(spec.prompt_tokens, spec.decode_depth + spec.decode_tokens)


def _prompts(spec: MeasureSpec, bundle: Bundle) -> tuple[tuple[int, ...], ...]:
    return spec.prompts or bundle.prompts


def _check_fits(spec: MeasureSpec, bundle: Bundle) -> None:
    """Raise `MeasureError` when context or prompts are too short for the spec."""
    context = bundle.model.context_length
    if _longest(spec) > context:
        raise MeasureError(
            f"pp{spec.prompt_tokens}, tg{spec.decode_tokens} @ d{spec.decode_depth} need {_longest(spec)} tokens, "
            f"the context of {bundle.name} holds {context}"
        )
    prompts, needed = _prompts(spec, bundle), max(spec.prompt_tokens, spec.decode_depth)
    shortest = min((len(p) for p in prompts), default=0)
    if shortest < needed:
        raise MeasureError(f"prompts of at least {needed} tokens are needed, the shortest has {shortest}")


def _pin(cpus: tuple[int, ...]) -> None:
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        allowed = sorted(os.sched_getaffinity(0))
        raise MeasureError(f"cpus: cannot pin to {list(cpus)} ({error.strerror}); allowed are {allowed}") from error


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that happens."""
    import ctypes  # every engine loads it anyway

    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


if __name__ == "__main__":
    main()
