"""A grid of measurements over bundles, in llama-bench's terms: `pp128` is a prompt, `tg96 @ d32` decode at depth."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.measure import build_spec, measure_rounds
from ryot.edge.protocol import MeasureResult, MeasureSpec
from ryot.errors import ContextError


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What is measured: every prompt length and every (tokens, depth), for every batch size and thread count."""

    n_prompt: tuple[int, ...]
    n_gen: tuple[int, ...]
    n_depth: tuple[int, ...]
    batch: tuple[int, ...]
    threads: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One test of one bundle; samples are kept per process, in order."""

    bundle: str
    precision: str
    size_bytes: int
    params: int
    engine: str
    threads: int
    batch: int
    test: str
    tokens_per_s: float | None
    """Mean over processes of each process's median; tokens of all rows of the batch."""
    tokens_per_s_sd: float | None
    ms: float | None
    """Time to first token of a prompt, or time of one decoded token."""
    peak_rss_bytes: int | None
    reason: str
    """Why there is no figure."""
    samples_ms: list[list[float]]


class BenchCase(NamedTuple):
    """One process's work: a prompt, a decode behind some depth, or both, of one bundle."""

    bundle: int
    """Its place among the bundles."""
    prompt: int | None
    """Length of the prompt whose time counts; None where all lengths have been had."""
    decode: tuple[int, int] | None
    """(tokens, depth)."""
    batch: int
    threads: int


def plan_grid(number: int, bundle: Bundle, grid: Grid) -> dict[BenchCase, MeasureSpec]:
    """The measurements of a bundle. Raises `ContextError` for a test that its context cannot hold."""
    context = bundle.model.context_length
    for prompt in grid.n_prompt:
        _check(prompt, context, f"pp{prompt}")
    decodes = list(itertools.product(grid.n_gen, grid.n_depth))
    for tokens, depth in decodes:
        _check(tokens + depth, context, _decode_name(tokens, depth))
    specs = {}
    pairs = itertools.zip_longest(grid.n_prompt, decodes)
    for (prompt, decode), batch, threads in itertools.product(pairs, grid.batch, grid.threads):
        specs[BenchCase(number, prompt, decode, batch, threads)] = build_spec(
            bundle,
            prompt_tokens=prompt or grid.n_prompt[-1],
            decode_tokens=decode[0] if decode else 0,
            decode_depth=decode[1] if decode else 1,
            batch_size=batch,
            threads=threads,
        )
    return specs


def run_grid(
    paths: Sequence[Path],
    grid: Grid,
    *,
    rounds: int,
    on_result: Callable[[Path, MeasureResult], None] = lambda path, result: None,
) -> list[BenchRow]:
    """Measure all bundles over the grid, interleaved, and return a row per test; `on_result` is told the bundle."""
    bundles = [load_bundle(path) for path in paths]
    specs: dict[BenchCase, MeasureSpec] = {}
    for number, bundle in enumerate(bundles):
        specs |= plan_grid(number, bundle, grid)
    results = measure_rounds(specs, rounds=rounds, on_result=lambda case, result: on_result(paths[case.bundle], result))
    rows = []
    for case, spec in specs.items():
        bundle, own = bundles[case.bundle], results[case]
        if case.prompt is not None:
            rows.append(_row(bundle, spec, own, f"pp{case.prompt}", case.prompt, _prompt_ms))
        if case.decode is not None:
            rows.append(_row(bundle, spec, own, _decode_name(*case.decode), 1, _token_ms))
    return rows


def _row(
    bundle: Bundle,
    spec: MeasureSpec,
    results: Sequence[MeasureResult],
    test: str,
    tokens: int,
    samples_of: Callable[[MeasureResult], list[float]],
) -> BenchRow:
    good = [r for r in results if r.ok]
    samples = [samples_of(r) for r in good]
    medians = [statistics.median(s) for s in samples if s]
    rates = [1e3 * tokens * spec.batch_size / ms for ms in medians]
    peaks = [r.peak_rss_bytes for r in good if r.peak_rss_bytes]
    return BenchRow(
        bundle=str(bundle.path),
        precision=bundle.precision,
        size_bytes=bundle.size_bytes,
        params=bundle.model.num_parameters,
        engine=good[0].engine if good else "",
        threads=spec.threads,
        batch=spec.batch_size,
        test=test,
        tokens_per_s=statistics.fmean(rates) if rates else None,
        tokens_per_s_sd=statistics.stdev(rates) if len(rates) > 1 else None,
        ms=statistics.median(medians) if medians else None,
        peak_rss_bytes=max(peaks, default=None),
        reason="; ".join(sorted({r.reason for r in results if not r.ok})),
        samples_ms=samples,
    )


def _prompt_ms(result: MeasureResult) -> list[float]:
    return result.ttft_ms


def _token_ms(result: MeasureResult) -> list[float]:
    """Milliseconds per step, one per run."""
    return [1e3 * result.batch_size / rate for rate in result.decode_tok_s]


def _decode_name(tokens: int, depth: int) -> str:
    return f"tg{tokens} @ d{depth}"


def _check(tokens: int, context: int, test: str) -> None:
    if tokens > context:
        raise ContextError(f"{test}: needs {tokens} tokens, the bundle's context holds {context}", hint="ask for fewer")


def row_cells(row: BenchRow) -> dict[str, object]:
    """The cells of a row as the tables show them, by header."""
    spread = f" ± {row.tokens_per_s_sd:.1f}" if row.tokens_per_s_sd is not None else ""
    return {
        "bundle": Path(row.bundle).name,
        "precision": row.precision,
        "size MB": f"{row.size_bytes / 1e6:.2f}",
        "params M": f"{row.params / 1e6:.2f}",
        "backend": row.engine,
        "threads": row.threads,
        "batch": row.batch,
        "test": row.test,
        "t/s": f"{row.tokens_per_s:.1f}{spread}" if row.tokens_per_s is not None else row.reason,
        "ms": f"{row.ms:.3f}" if row.ms is not None else "",
        "peak MB": f"{row.peak_rss_bytes / 1e6:.1f}" if row.peak_rss_bytes else "",
    }
