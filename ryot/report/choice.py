"""Which artifact goes into the bundle: the smallest or the fastest of those that pass every limit of every target."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ryot.errors import EXIT_OK, EXIT_QUALITY, EXIT_TARGET_MISSED
from ryot.report.rows import ArtifactRow, Cause, Choice, Verdict
from ryot.report.samples import paired_ratio
from ryot.report.stats import call_difference
from ryot.report.targets import LIMITS, Target
from ryot.report.verdicts import overall


def choose_artifact(rows: Sequence[ArtifactRow], verdicts: Sequence[Verdict], targets: Sequence[Target]) -> Choice:
    """The artifact to ship and the reason in one sentence; exit code 3 when none passes, 4 when every gate failed.

    With several targets an artifact has to pass all of them; the first one's preference decides. Without a passing one
    the nearest is named with what it misses: fewest limits missed, then the least overstepping.
    """
    names = ", ".join(t.name for t in targets)
    allowed = [r for r in rows if r.passed]
    if not allowed:
        reasons = "; ".join(f"{_label(r)}: {r.reason or 'gate failed'}" for r in rows) or "nothing was exported"
        return Choice(reason=f"No artifact passed the gates ({reasons}).", exit_code=EXIT_QUALITY)
    passing = [r for r in allowed if all(overall(r.verdicts.get(t.name, {})) == "PASS" for t in targets)]
    if not passing:
        return _nearest(allowed, verdicts, names)
    prefer = targets[0].prefer if targets else "smallest"
    best = _smallest(passing) if prefer == "smallest" else _fastest(passing)
    return Choice(
        variant=best.variant,
        seed=best.seed,
        precision=best.precision,
        reason=_reason(best, passing, allowed, prefer, names),
        exit_code=EXIT_OK,
    )


def mark_pareto(rows: Sequence[ArtifactRow]) -> list[bool]:
    """For each artifact whether it is on the Pareto front of size, TTFT, tokens/s and bits per byte.

    Artifacts that a gate stopped, that died or that were not measured are never on it.
    """
    points = [_point(r) for r in rows]
    return [p is not None and not any(_dominates(q, p) for q in points if q is not None) for p in points]


def _point(row: ArtifactRow) -> tuple[float, ...] | None:
    if not row.passed or row.runs_ok < row.runs or row.ttft_ms is None or row.decode_tok_s is None:
        return None
    return (row.size_bytes, row.ttft_ms, -row.decode_tok_s, row.quality.get("bpb") or math.inf)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b)) and a != b


def _smallest(rows: Sequence[ArtifactRow]) -> ArtifactRow:
    return min(rows, key=lambda r: (r.size_bytes, -(r.decode_tok_s or 0)))


def _fastest(rows: Sequence[ArtifactRow]) -> ArtifactRow:
    """The fastest in tokens/s; among those that can't be told from it, the smallest."""
    fastest = max(rows, key=lambda r: r.decode_tok_s or 0)
    return _smallest([r for r in rows if r is fastest or _same_speed(r, fastest)])


def _same_speed(a: ArtifactRow, b: ArtifactRow) -> bool:
    interval = paired_ratio(a, b, "decode_tok_s")
    return interval is not None and call_difference(interval) == "no difference"


def _nearest(rows: Sequence[ArtifactRow], verdicts: Sequence[Verdict], names: str) -> Choice:
    def missed(row: ArtifactRow) -> list[Verdict]:
        return [v for v in verdicts if v.id == row.id and v.verdict != "PASS"]

    def distance(row: ArtifactRow) -> tuple[int, float, int]:
        found = missed(row)
        return len(found), sum(_overstep(v) for v in found), row.size_bytes

    best = min(rows, key=distance)
    misses = tuple(describe_miss(v) for v in missed(best))
    failed = any(v.verdict == "FAIL" for v in missed(best))
    verb = "misses" if failed else "cannot be told to meet"
    return Choice(
        variant=best.variant,
        seed=best.seed,
        precision=best.precision,
        reason=f"No artifact passes every limit of {names}; "
        f"{_label(best)} is the nearest and {verb} {'; '.join(misses)}.",
        missed=misses,
        exit_code=EXIT_TARGET_MISSED,
    )


def describe_miss(verdict: Verdict) -> str:
    """`TTFT 131 > 120 ms (phase1)`, or the reason why there is no value."""
    kind = LIMITS[verdict.limit_key]
    if verdict.value is None or verdict.cause is Cause.DIED:
        return f"{kind.title}: {verdict.note} ({verdict.target})"
    if verdict.verdict == "INCONCLUSIVE":
        return (
            f"{kind.title} {verdict.value:.4g} [{verdict.low:.4g}, {verdict.high:.4g}] against {verdict.limit:g}"
            f" {kind.unit} ({verdict.target}{', ' + verdict.note if verdict.cause is Cause.THREADS else ''})"
        )
    sign = ">" if kind.at_most else "<"
    if kind.unit == "ratio":
        return f"{kind.title} {verdict.value:.4f} {sign} {verdict.limit:g} ({verdict.target})"
    return f"{kind.title} {verdict.value:.4g} {sign} {verdict.limit:g} {kind.unit} ({verdict.target})"


def _overstep(verdict: Verdict) -> float:
    if verdict.value is None or verdict.value <= 0:
        return 10.0
    return abs(math.log(verdict.value / verdict.limit))


def _reason(
    best: ArtifactRow, passing: Sequence[ArtifactRow], allowed: Sequence[ArtifactRow], prefer: str, names: str
) -> str:
    all_limits = f"every limit of {names}"
    size = f"{best.size_bytes / 1e6:.2f} MB"
    figures = size if best.decode_tok_s is None else f"{size}, {best.decode_tok_s:.0f} tok/s"
    if len(passing) == 1 and len(allowed) == 1:
        return f"{_label(best)} is the only artifact and passes {all_limits} ({figures})."
    if len(passing) == 1:
        return f"{_label(best)} is the only one of {len(allowed)} artifacts that passes {all_limits} ({figures})."
    return f"{_label(best)} is the {prefer} of the {len(passing)} artifacts that pass {all_limits} ({figures})."


def _label(row: ArtifactRow) -> str:
    return f"{row.variant} {row.precision}"
