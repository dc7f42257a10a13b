"""Two reports (or bundles' records) held against each other after the fact.

Recordings made one after the other are not interleaved: what the machine did in between is part of their ratio, and
the comparison says so. `ryot-deploy compare --measure` measures both sides in the same rounds instead.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ryot.errors import ConfigError
from ryot.mapping import to_mapping
from ryot.report.rows import ArtifactRow, Report
from ryot.report.samples import paired_ratio, samples_of
from ryot.report.stats import Interval, call_difference, unpaired_ratio_interval
from ryot.report.table import WIDTH, Column, Format, markdown_table, plain_table, ratio_text, wrap
from ryot.report.targets import cpu_name

#: Figures that a process measures, with the name that the lines have.
MEASURED = {
    "ttft_ms": "TTFT (ms)",
    "decode_tok_s": "decode (tok/s)",
    "load_ms": "load (ms)",
    "peak_rss_bytes": "memory (MB)",
}
_PROTOCOL = ("prompt_tokens", "decode_tokens", "decode_depth", "batch_size", "threads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One metric of one artifact (or training) in both reports."""

    subject: str
    key: str
    """The metric, as the report's fields call it."""
    metric: str
    """The same for people."""
    a: float | None
    b: float | None
    ratio: float | None
    """a / b."""
    low: float | None = None
    high: float | None = None
    verdict: Literal["lower", "higher", "no difference", "single values", "not compared"]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareResult:
    """What two reports say about each other."""

    a: str
    b: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def compare_reports(a: Report, b: Report, *, name_a: str | None = None, name_b: str | None = None) -> CompareResult:
    """Every artifact that both reports have, or the two named ones (`variant/precision`).

    Without names and without an artifact in common the chosen ones are compared. Loss is compared only where corpus and
    tokenizer are the same; bits per byte always.
    """
    pairs = _pair_artifacts(a, b, name_a, name_b)
    same_text, text_notes = _same_text(a, b)
    notes = [*text_notes]
    together = (a.run_id, a.created_at) == (b.run_id, b.created_at)
    if not together:
        notes.append(
            "The two were measured at different times, not interleaved: their ratios hold the machine's drift too."
        )
    if machine_key(a) != machine_key(b):
        notes.append(
            f"Different machines ({cpu_name(a.machine)}; {cpu_name(b.machine)}):"
            " timings and memory compare the machines as well."
        )
    if a.quick or b.quick:
        notes.append("At least one is a quick run with a small budget: not comparable.")
    lines: list[Line] = []
    for left, right in pairs:
        subject = name_of(left) if name_of(left) == name_of(right) else f"{name_of(left)} / {name_of(right)}"
        lines += compare_artifacts(subject, left, right, together)
    for left_row, right_row in dict.fromkeys(((x.variant, x.seed), (y.variant, y.seed)) for x, y in pairs):
        lines += _compare_trainings(a, b, left_row, right_row, same_text)
    return CompareResult(a=a.run_id, b=b.run_id, lines=tuple(lines), notes=tuple(notes))


def render_comparison(result: CompareResult, fmt: Format = "table") -> str:
    """The comparison as text."""
    if fmt == "json":
        return json.dumps({"schema": 1, **to_mapping(result, keep_none=True)}, indent=1)
    rows = result.lines
    columns = line_columns(rows)
    if fmt == "csv":
        return render_lines_csv(rows)
    names = [f"A: {result.a}", f"B: {result.b}"]
    remarks = [*result.notes, *dict.fromkeys(f"{r.metric}: {r.note}" for r in rows if r.note)]
    if fmt == "md":
        return "\n\n".join(["\n".join(f"- {n}" for n in names), markdown_table(columns), "\n".join(remarks)])
    return "\n\n".join(["\n".join(names), plain_table(columns), "\n".join(wrap(r, WIDTH) for r in remarks)])


def line_columns(rows: Sequence[Line], a: str = "A", b: str = "B") -> list[Column]:
    """The lines as columns of a table; `a` and `b` head the two sides."""
    return [
        Column("subject", "artifact", tuple(r.subject for r in rows), needed=True),
        Column("metric", "metric", tuple(r.metric for r in rows), needed=True),
        Column("a", a, tuple(number_text(r.a) for r in rows), needed=True, right=True),
        Column("b", b, tuple(number_text(r.b) for r in rows), needed=True, right=True),
        Column("ratio", f"{a} / {b}\n[98 %]", tuple(line_ratio_text(r) for r in rows), needed=True),
        Column("verdict", f"{a} is", tuple(r.verdict for r in rows), needed=True),
    ]


def render_lines_csv(rows: Sequence[Line]) -> str:
    """The lines as CSV in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("subject", "metric", "a", "b", "ratio", "low", "high", "verdict", "note"))
    writer.writerows((r.subject, r.metric, r.a, r.b, r.ratio, r.low, r.high, r.verdict, r.note) for r in rows)
    return out.getvalue().removesuffix("\n")


def compare_artifacts(subject: str, a: ArtifactRow, b: ArtifactRow, together: bool) -> list[Line]:
    """One line per metric; `together` says that both were measured in the same rounds."""
    lines = []
    differing = [k for k in _PROTOCOL if _protocol(a).get(k) != _protocol(b).get(k)]
    for metric, title in MEASURED.items():
        scale = 1e-6 if metric == "peak_rss_bytes" else 1.0
        left, right = (None if v is None else v * scale for v in (getattr(a, metric), getattr(b, metric)))
        if left is None or right is None:
            continue
        if differing:
            note = "not compared, measured differently: " + ", ".join(
                f"{k} {_protocol(a).get(k)} and {_protocol(b).get(k)}" for k in differing
            )
            lines.append(
                Line(
                    subject=subject,
                    key=metric,
                    metric=title,
                    a=left,
                    b=right,
                    ratio=None,
                    verdict="not compared",
                    note=note,
                )
            )
            continue
        interval = (
            paired_ratio(a, b, metric)
            if together
            else unpaired_ratio_interval(samples_of(a, metric), samples_of(b, metric))
        )
        lines.append(_line(subject, metric, left, right, interval, title))
    for metric, title, left, right in (
        ("size_bytes", "size (MB)", a.size_bytes / 1e6, b.size_bytes / 1e6),
        ("bpb", "bits per byte", a.quality.get("bpb"), b.quality.get("bpb")),
    ):
        if left and right:
            ratio = left / right
            lines.append(_line(subject, metric, left, right, Interval(ratio, ratio, ratio, 2), title))
    return lines


def _compare_trainings(
    a: Report, b: Report, of_a: tuple[str, int], of_b: tuple[str, int], same_text: bool
) -> list[Line]:
    left = next((v for v in a.variants if (v.name, v.seed) == of_a), None)
    right = next((v for v in b.variants if (v.name, v.seed) == of_b), None)
    if left is None or right is None:
        return []
    subject = f"{left.name} training" if left.name == right.name else f"{left.name} / {right.name} training"
    lines = []
    for metric, title in (("train_wall_s", "time (s)"), ("test_bpb", "test bits per byte"), ("test_loss", "test loss")):
        x, y = getattr(left, metric), getattr(right, metric)
        if not x or not y:
            continue
        if metric == "test_loss" and not same_text:
            lines.append(
                Line(
                    subject=subject, key=metric, metric=title, a=x, b=y, ratio=None, verdict="not compared",
                    note="nats per token mean different things for different tokenizers or texts; see bits per byte",
                )
            )  # fmt: skip
            continue
        concurrent = metric == "train_wall_s" and (left.concurrent or right.concurrent)
        lines.append(
            Line(
                subject=subject, key=metric, metric=title, a=x, b=y, ratio=x / y, verdict="single values",
                note="trained beside others on one machine: not for quoting" if concurrent else "",
            )
        )  # fmt: skip
    return lines


def _same_text(a: Report, b: Report) -> tuple[bool, list[str]]:
    """Whether losses in nats per token mean the same in both, and what to say when they don't."""
    notes = []
    for key, title in (("sha256", "corpora"), ("tokenizer_sha256", "tokenizers"), ("vocab_size", "vocabularies")):
        x, y = a.corpus.get(key), b.corpus.get(key)
        if x != y:
            short = [str(v)[:12] if v is not None else "not recorded" for v in (x, y)]
            notes.append(
                f"Different {title} ({short[0]} and {short[1]}): bits per byte is compared, loss is not"
                + (", and bits per byte is of different texts." if key == "sha256" else ".")
            )
    return not notes, notes


def _pair_artifacts(
    a: Report, b: Report, name_a: str | None, name_b: str | None
) -> list[tuple[ArtifactRow, ArtifactRow]]:
    if name_a or name_b:
        return [(_find_artifact(a, name_a or name_b), _find_artifact(b, name_b or name_a))]
    if common := [(x, y) for x in a.rows for y in b.rows if x.device and name_of(x) == name_of(y)]:
        return common
    right = {(r.variant, r.precision): r for r in b.rows}
    common = [(r, right[r.variant, r.precision]) for r in a.rows if (r.variant, r.precision) in right]
    return common or [(_find_artifact(a, None), _find_artifact(b, None))]


def _find_artifact(report: Report, name: str | None) -> ArtifactRow:
    """The artifact called `variant/precision`; without a name the chosen one, or the only one."""
    if name is None:
        chosen = [r for r in report.rows if r.chosen] or list(report.rows)
        if not chosen:
            raise ConfigError(f"report {report.run_id}: holds no artifact")
        return chosen[0]
    for row in report.rows:
        if name in (name_of(row), str(row.id)):
            return row
    raise ConfigError(
        f"report {report.run_id}: no artifact {name!r} (it has {', '.join(name_of(r) for r in report.rows) or 'none'})"
    )


def _line(subject: str, key: str, a: float, b: float, interval: Interval | None, title: str) -> Line:
    if interval is None:
        return Line(subject=subject, key=key, metric=title, a=a, b=b, ratio=a / b, verdict="single values")
    return Line(
        subject=subject, key=key, metric=title, a=a, b=b, ratio=interval.value, low=interval.low, high=interval.high,
        verdict=call_difference(interval),
    )  # fmt: skip


def _protocol(row: ArtifactRow) -> dict[str, int]:
    """How the artifact was measured, from its first process that worked."""
    return next(({k: getattr(s, k) for k in _PROTOCOL} for s in row.samples if s.ok), {})


def machine_key(report: Report) -> tuple[str, object]:
    """What tells two machines apart."""
    cpu = report.machine.get("cpu")
    return cpu_name(report.machine), cpu.get("cores") if isinstance(cpu, dict) else None


def name_of(row: ArtifactRow) -> str:
    """`variant/precision`, and `@device` of one that was measured elsewhere."""
    return f"{row.variant}/{row.precision}" + (f"@{row.device}" if row.device else "")


def number_text(value: float | None) -> str:
    """Four significant digits."""
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def line_ratio_text(line: Line) -> str:
    """`1.020 [0.990, 1.050]`"""
    return "-" if line.ratio is None else ratio_text(line.ratio, line.low, line.high, 3)


def all_agree(lines: Sequence[Line]) -> bool:
    """Whether no line of a comparison shows a difference (what two recordings of the same case should say)."""
    return all(line.verdict in ("no difference", "single values", "not compared") for line in lines)
