"""A report as text: for the terminal (at most 100 columns), Markdown, CSV and JSON, from the same columns."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence

from ryot.report.columns import ablation_columns, artifact_columns, find_comparison, limit_columns
from ryot.report.rows import Report, report_to_dict
from ryot.report.table import (
    WIDTH,
    Cell,
    Column,
    Format,
    constant_columns,
    markdown_table,
    plain_table,
    varying_columns,
    wrap,
)

_GAP = 2


def render(report: Report, fmt: Format = "table", *, width: int = WIDTH) -> str:
    """The report as text in one format; `width` holds for the terminal's table."""
    if fmt == "json":
        return json.dumps(report_to_dict(report), indent=1, allow_nan=False)
    if fmt == "csv":
        return render_csv(report)
    if fmt == "md":
        tables = (artifact_columns(report), ablation_columns(report), limit_columns(report))
        return "\n\n".join(t for t in map(markdown_table, tables) if t)
    blocks = [
        *artifact_blocks(artifact_columns(report), width),
        plain_table(ablation_columns(report)),
        *limit_blocks(report, width),
    ]
    return "\n\n".join([b for b in blocks if b] + ["\n".join(wrap(line, width) for line in footnotes(report))])


def limit_blocks(report: Report, width: int) -> list[str]:
    """The second table; one per artifact, under its name, where a single one would be wider than `width`."""
    columns = limit_columns(report)
    whole = plain_table(columns)
    if max(map(len, whole.splitlines()), default=0) <= width:
        return [whole]
    blocks = []
    for name in dict.fromkeys(columns[0].cells):
        kept = [k for k, cell in enumerate(columns[0].cells) if cell == name]
        part = [dataclasses.replace(c, cells=tuple(c.cells[k] for k in kept)) for c in columns[1:]]
        blocks.append(f"{name}\n{plain_table(part)}")
    return blocks


def footnotes(report: Report) -> list[str]:
    """The lines below the tables: what the columns mean, the choice and the warnings."""
    lines = []
    same = constant_columns(artifact_columns(report)) if len(report.rows) > 1 else []
    if same:
        lines.append("Same for all rows: " + ", ".join(_constant_text(c) for c in same) + ".")
    base = report.baseline_row
    if base is not None and len(report.rows) > 1:
        lines.append(
            f"Ratios are to {base.variant} {base.precision}; = is no difference (the 98 % interval holds 1)."
            " bpb ratio, KL and top-1 are to the variant's own fp32."
        )
    if any(v.concurrent for v in report.variants):
        lines.append("* concurrent: these trained at the same time on one machine, so the times are not for quoting.")
    if report.choice is not None:
        lines.append(report.choice.reason)
    return lines + list(report.notes)


def artifact_blocks(columns: Sequence[Column], width: int) -> list[str]:
    """The main table as one block, or as several below each other where one would be wider than `width`."""
    shown = varying_columns(columns)
    keys = [c for c in shown if c.name in ("device", "variant", "seed", "precision")]
    rest = [c for c in shown if c not in keys]
    blocks = []
    waiting = sorted(rest, key=lambda c: (not c.name.startswith("verdict"), not c.first, rest.index(c)))
    while waiting:
        used = sum(c.width() + _GAP for c in keys) - _GAP
        taken: list[Column] = []
        for column in waiting:
            if not taken or used + _GAP + column.width() <= width:
                taken.append(column)
                used += _GAP + column.width()
        waiting = [c for c in waiting if c not in taken]
        blocks.append(plain_table([*keys, *sorted(taken, key=rest.index)]))
    return blocks


def render_csv(report: Report) -> str:
    """One line per artifact with every figure in full precision; the header names carry the units."""
    rows = report.rows
    columns: dict[str, list[Cell]] = {}
    for column in artifact_columns(report):
        if not column.name.endswith("_ratio") or column.name == "bpb_ratio":
            columns[column.name] = list(column.cells)
    for metric in ("ttft_ms", "decode_tok_s", "peak_rss_bytes", "load_ms"):
        for k, end in enumerate(("low", "high")):
            columns[f"{metric}_{end}"] = [r.intervals[metric][k] if metric in r.intervals else None for r in rows]
    for metric in ("ttft_ms", "decode_tok_s", "peak_rss_bytes", "size_bytes"):
        found = [find_comparison(report, r, metric) for r in rows]
        for name in ("ratio", "low", "high", "verdict"):
            columns[f"{metric}_vs_baseline_{name}"] = [None if c is None else getattr(c, name) for c in found]
    columns |= {
        "load_ms": [r.load_ms for r in rows],
        "e2e_ttft_ms": [r.e2e_ttft_ms for r in rows],
        "bpb": [r.quality.get("bpb") for r in rows],
        "runs": [r.runs for r in rows],
        "runs_ok": [r.runs_ok for r in rows],
        "pareto": [r.pareto for r in rows],
        "chosen": [r.chosen for r in rows],
        "reason": [r.reason for r in rows],
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values()))
    return out.getvalue().removesuffix("\n")


def _constant_text(column: Column) -> str:
    title, _, unit = column.header.partition("\n")
    return f"{title} {column.texts()[0]}" + (f" {unit}" if unit and not unit.startswith("[") else "")
