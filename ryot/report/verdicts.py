"""PASS, FAIL or INCONCLUSIVE for each limit of a target, from the interval of the measured figure."""

from __future__ import annotations

from collections.abc import Mapping

from ryot.report.rows import ArtifactRow, Cause, Verdict, VerdictWord
from ryot.report.targets import LIMITS, METRICS, LimitKind, Target, cpu_name

#: Limits that hold a timed or measured figure; the others are facts of the exported files.
_MEASURED = ("ttft_ms", "decode_tok_s", "peak_rss_mb")


def judge_artifact(row: ArtifactRow, target: Target, machine: Mapping[str, object]) -> list[Verdict]:
    """One verdict for each limit that the target sets."""
    return [_judge(row, target, key, machine) for key in target.limits]


def verdict_words(verdicts: list[Verdict]) -> dict[str, VerdictWord | None]:
    """Every metric's word; None where the target sets no limit."""
    found = {v.metric: v.verdict for v in verdicts}
    return {metric: found.get(metric) for metric in METRICS}


def overall(verdicts: Mapping[str, VerdictWord | None]) -> VerdictWord:
    """FAIL when any limit fails, else INCONCLUSIVE when any cannot be told, else PASS."""
    words = set(verdicts.values())
    return "FAIL" if "FAIL" in words else "INCONCLUSIVE" if "INCONCLUSIVE" in words else "PASS"


def place_note(target: Target, machine: Mapping[str, object]) -> str:
    """How far the verdict reaches: the device itself, or this CPU under the device's limits."""
    cpu = cpu_name(machine)
    if target.device is None:
        return f"measured on this CPU ({cpu})"
    if target.is_device(machine):
        return f"measured on the device ({cpu})"
    return f"measured under the target's limits on this CPU ({cpu}), not on {target.device.name}"


def _judge(row: ArtifactRow, target: Target, key: str, machine: Mapping[str, object]) -> Verdict:
    kind, limit = LIMITS[key], target.limits[key]
    value, low, high = limited_value(row, key)
    word, cause, note = _word(row, target, key, kind, limit, value, low, high)
    if cause is Cause.LIMIT:
        parts = []
        if key in _MEASURED:
            if target.device is not None and not target.is_device(machine):
                parts.append("measured under the target's limits on this CPU")
            if key != "peak_rss_mb" and (used := _threads(row)) < target.threads:
                parts.append(f"with {used} of its {target.threads} threads")
            if key == "peak_rss_mb":
                parts.append(memory_mode(row, limit))
        note = ", ".join(p for p in parts if p)
    return Verdict(
        target=target.name,
        variant=row.variant,
        seed=row.seed,
        precision=row.precision,
        metric=kind.metric,
        limit_key=key,
        limit=limit,
        value=value,
        low=low,
        high=high,
        verdict=word,
        cause=cause,
        note=note,
        device=row.device,
    )


def _word(
    row: ArtifactRow,
    target: Target,
    key: str,
    kind: LimitKind,
    limit: float,
    value: float | None,
    low: float | None,
    high: float | None,
) -> tuple[VerdictWord, Cause, str]:
    if key in _MEASURED and row.runs > row.runs_ok:
        return "FAIL", Cause.DIED, death_reason(row)
    if key == "bpb_ratio" and not row.passed and value is None:
        return "FAIL", Cause.GATE, row.reason or "a gate failed"
    if value is None or low is None or high is None:
        return "INCONCLUSIVE", Cause.NOT_MEASURED, "not measured"
    passes_best, passes_worst = (low <= limit, high <= limit) if kind.at_most else (high >= limit, low >= limit)
    timed, used = key in ("ttft_ms", "decode_tok_s"), _threads(row)
    if timed and (used > target.threads if passes_worst else used < target.threads):
        note = f"measured with {_plural(used, 'thread')}, the target has {target.threads}"
        return "INCONCLUSIVE", Cause.THREADS, note
    if not passes_best:
        return "FAIL", Cause.LIMIT, ""
    return "PASS" if passes_worst else "INCONCLUSIVE", Cause.LIMIT, ""


def _threads(row: ArtifactRow) -> int:
    return max((s.threads for s in row.samples), default=1)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def limited_value(row: ArtifactRow, key: str) -> tuple[float | None, float | None, float | None]:
    """The artifact's value, low and high for a limit, in the limit's unit; exact figures have low = high."""
    if key == "size_mb":
        exact: float | None = row.size_bytes / 1e6
    elif key == "bpb_ratio":
        exact = row.quality.get("bpb_ratio")
    elif key == "context_tokens":
        exact = row.context_tokens
    else:
        name, scale = ("peak_rss_bytes", 1e-6) if key == "peak_rss_mb" else (key, 1.0)
        value = getattr(row, name)
        if value is None:
            return None, None, None
        low, high = row.intervals.get(name, (value, value))
        return value * scale, low * scale, high * scale
    return exact, exact, exact


def memory_mode(row: ArtifactRow, limit_mb: float) -> str:
    """`enforced` when every process ran under a memory limit no looser than this one, else `checked`."""
    modes = {s.memory_limit for s in row.samples if s.ok}
    applied = [s.memory_limit_bytes for s in row.samples if s.ok]
    if modes == {"enforced"} and all(b is None or b <= limit_mb * 1e6 for b in applied):
        return "enforced"
    return "checked"


def death_reason(row: ArtifactRow) -> str:
    """Why processes of this artifact died, with how many did."""
    reasons = [s.reason or "no reason given" for s in row.samples if not s.ok]
    first = reasons[0] if reasons else row.reason or "no reason given"
    return f"{row.runs - row.runs_ok} of {row.runs} processes failed: {first}"
