"""The raw samples inside a form's row, arranged for the statistics: one list a process, in order of the rounds."""

from __future__ import annotations

from ryot.report.rows import FormRow
from ryot.report.stats import Interval, ratio_interval

#: Metrics that a fresh process measures, by the field that a table prints.
TIMED = ("ttft_ms", "decode_tok_s", "e2e_ttft_ms", "first_ttft_ms", "cold_start_ms", "load_ms")


def samples_of(row: FormRow, metric: str) -> list[list[float]]:
    """The samples of one metric, a list a process; empty for a process that failed or did not measure it."""
    return [_values(result.get(metric) if result.get("ok") else None) for result in row.samples]


def paired_ratio(a: FormRow, b: FormRow, metric: str) -> Interval | None:
    """The ratio a / b of a metric, paired by the number of the round in which each process ran."""
    right = {r.get("round", k): r for k, r in enumerate(b.samples) if r.get("ok")}
    pairs = []
    for k, result in enumerate(a.samples):
        other = right.get(result.get("round", k))
        if result.get("ok") and other is not None:
            pairs.append((_values(result.get(metric)), _values(other.get(metric))))
    return ratio_interval([x for x, _ in pairs], [y for _, y in pairs])


def token_latencies(row: FormRow) -> list[float]:
    """Every inter-token latency of the form in ms, all processes and repetitions together."""
    found: list[float] = []
    for result in row.samples:
        if result.get("ok"):
            for repetition in result.get("token_ms") or ():
                found.extend(_values(repetition))
    return found


def _values(value: object) -> list[float]:
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [float(v) for v in value]
    return [float(value)]  # type: ignore[arg-type]
