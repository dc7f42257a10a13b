"""The raw samples inside an artifact's row, arranged for statistics: one list per process, in order of the rounds."""

from __future__ import annotations

from ryot.edge.protocol import MeasureResult
from ryot.report.rows import ArtifactRow
from ryot.report.stats import Interval, ratio_interval

#: Metrics that a fresh process measures, by the field that a table prints.
TIMED = ("ttft_ms", "decode_tok_s", "e2e_ttft_ms", "first_ttft_ms", "cold_start_ms", "load_ms")


def samples_of(row: ArtifactRow, metric: str) -> list[list[float]]:
    """The samples of one metric, a list per process; empty for a process that failed or did not measure it."""
    return [_values(result, metric) if result.ok else [] for result in row.samples]


def paired_ratio(a: ArtifactRow, b: ArtifactRow, metric: str) -> Interval | None:
    """The ratio a / b of a metric, paired by the number of the round in which each process ran."""
    right = {r.round: r for r in b.samples if r.ok}
    pairs = [
        (_values(result, metric), _values(right[result.round], metric))
        for result in a.samples
        if result.ok and result.round in right
    ]
    return ratio_interval([x for x, _ in pairs], [y for _, y in pairs])


def token_latencies(row: ArtifactRow) -> list[float]:
    """Every inter-token latency of the artifact in ms, all processes and repetitions together."""
    return [ms for result in row.samples if result.ok for repetition in result.token_ms for ms in repetition]


def peak_bytes(result: MeasureResult) -> int:
    """The larger of the peak that the process saw of itself and the one seen from outside; 0 for neither."""
    return max(result.peak_rss_bytes or 0, result.peak_rss_outside_bytes or 0)


def _values(result: MeasureResult, metric: str) -> list[float]:
    value = getattr(result, metric)
    if value is None:
        return []
    return [float(v) for v in value] if isinstance(value, list) else [float(value)]
