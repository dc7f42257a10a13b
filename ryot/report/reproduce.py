"""Whether a second measurement repeats what a first report says."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ryot.mapping import to_mapping
from ryot.report.compare import (
    MEASURED,
    Line,
    compare_artifacts,
    line_columns,
    line_ratio_text,
    machine_key,
    name_of,
    number_text,
    render_lines_csv,
)
from ryot.report.rows import ArtifactRow, Report
from ryot.report.table import WIDTH, Format, markdown_table, plain_table, wrap

#: What a second measurement on the same machine may differ by and still agree. Timings: what separate sessions on a
#: quiet machine differ by; memory: the allocator's and the kernel's rounding.
TIMING_MARGIN, MEMORY_MARGIN = 0.05, 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """Whether a second measurement agrees with a first, line by line (a is the new report, b the old one)."""

    agrees: bool
    lines: tuple[Line, ...]
    differences: tuple[str, ...]
    notes: tuple[str, ...]


def check_reproduced(old: Report, new: Report) -> Reproduction:
    """Hold a new measurement against the report that it repeats.

    A timing differs when its ratio's interval lies wholly outside 1 ± TIMING_MARGIN, memory outside MEMORY_MARGIN;
    size may not move at all, and no verdict may change. On another machine timings and memory are shown and don't
    count. Quality is not measured again.
    """
    same_machine = machine_key(old) == machine_key(new)
    lines: list[Line] = []
    differences: list[str] = []
    notes = [] if same_machine else ["Another machine: timings and memory are shown and don't count."]
    notes.append("Quality is not measured again: ryot-deploy eval does that.")
    for before in old.rows:
        after = new.row_of(before.id)
        if after is None:
            differences.append(f"{name_of(before)}: measured then, missing now")
            continue
        found = [c for c in compare_artifacts(name_of(before), after, before, together=False) if c.key != "bpb"]
        lines += found
        for line in found:
            margin = _margin(line.key)
            if line.key == "load_ms" or (line.key in MEASURED and not same_machine):
                continue
            if line.ratio is not None and _outside(line, margin):
                differences.append(
                    f"{line.subject}: {line.metric} {number_text(line.b)} then, {number_text(line.a)} now"
                    f" (ratio {line_ratio_text(line)}, allowed within {margin:.1%})"
                )
        differences += _changed_verdicts(before, after, same_machine)
    return Reproduction(agrees=not differences, lines=tuple(lines), differences=tuple(differences), notes=tuple(notes))


def _changed_verdicts(before: ArtifactRow, after: ArtifactRow, same_machine: bool) -> list[str]:
    facts = ("size", "context")
    return [
        f"{name_of(before)}: {target} {metric} was {word}, is {after.verdicts[target].get(metric)}"
        for target, words in before.verdicts.items()
        if target in after.verdicts
        for metric, word in words.items()
        if after.verdicts[target].get(metric) != word and (same_machine or metric in facts)
    ]


def _margin(key: str) -> float:
    return {"peak_rss_bytes": MEMORY_MARGIN, "size_bytes": 0.0}.get(key, TIMING_MARGIN)


def _outside(line: Line, margin: float) -> bool:
    assert line.ratio is not None
    low, high = line.low if line.low is not None else line.ratio, line.high if line.high is not None else line.ratio
    return high < 1 - margin or low > 1 + margin


def render_reproduction(found: Reproduction, fmt: Format = "table") -> str:
    """The new figures beside the old ones, and whether they agree."""
    if fmt == "json":
        return json.dumps({"schema": 1, **to_mapping(found, keep_none=True)}, indent=1)
    if fmt == "csv":
        return render_lines_csv(found.lines)
    closing = "The figures agree." if found.agrees else "The figures do not agree:"
    table = plain_table if fmt == "table" else markdown_table
    remarks = [*found.notes, closing, *(f"- {d}" for d in found.differences)]
    return "\n\n".join([table(line_columns(found.lines, "new", "old")), "\n".join(wrap(r, WIDTH) for r in remarks)])
