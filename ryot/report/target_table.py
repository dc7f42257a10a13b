"""The list of targets for people: limits, device, what is preferred, and where the numbers come from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from textwrap import indent

from ryot.mapping import to_mapping
from ryot.report.table import WIDTH, Column, Format, markdown_table, plain_table, wrap
from ryot.report.targets import LIMITS, Target


def render_targets(targets: Sequence[Target], fmt: Format = "table") -> str:
    """One row per target, with every limit that any of them sets; JSON has devices and sources too."""
    if fmt == "json":
        return json.dumps({"schema": 1, "targets": [to_mapping(t) for t in targets]}, indent=1)
    columns = _columns(targets)
    if fmt == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(c.name for c in columns)
        writer.writerows(zip(*(c.cells for c in columns)))
        return out.getvalue().removesuffix("\n")
    if fmt == "md":
        return markdown_table(columns)
    return plain_table(columns) + "\n\n" + "\n".join(wrap(f"{t.name}: {t.summary}", WIDTH) for t in targets)


def render_target(target: Target) -> str:
    """One target with the source of each of its numbers."""
    values: dict[str, object] = dict(target.limits)
    if target.device is not None:
        values |= {key: getattr(target.device, key) for key in ("cores", "ram_mb", "isa", "threads")}
    lines = [f"{target.name}: {target.summary}", f"  prefers the {target.prefer} artifact that passes"]
    for key, value in values.items():
        kind = LIMITS.get(key)
        shown = " ".join(value) if isinstance(value, tuple) else f"{value:g}"
        lines.append(f"  {key} {kind.sign} {shown}" if kind else f"  {key} {shown}")
        if key in target.sources:
            lines.append(indent(wrap(target.sources[key], WIDTH - 4).replace("\n  ", "\n"), "    "))
    return "\n".join(lines)


def _columns(targets: Sequence[Target]) -> list[Column]:
    limits = [
        Column(
            key, f"{kind.title}\n{kind.sign} {kind.unit}",
            tuple(f"{t.limits[key]:g}" if key in t.limits else None for t in targets), needed=True, right=True,
        )
        for key, kind in LIMITS.items()
        if any(key in t.limits for t in targets)
    ]  # fmt: skip
    return [
        Column("target", "target", tuple(t.name for t in targets), needed=True),
        *limits,
        Column("cores", "cores", tuple(None if t.device is None else t.device.cores for t in targets), 0, True),
        Column("ram_mb", "RAM\nMB", tuple(None if t.device is None else t.device.ram_mb for t in targets), 0, True),
        Column("prefer", "prefers", tuple(t.prefer for t in targets), needed=True),
    ]
