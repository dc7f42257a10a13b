"""report.md: the same tables as on the terminal, with what was trained, on what, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from ryot.report.columns import ablation_columns, artifact_columns, limit_columns
from ryot.report.render import footnotes
from ryot.report.rows import ArtifactRow, Report, VariantRow
from ryot.report.table import Cell, Column, markdown_table


def render_markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# {title(report)}", facts_line(report)]
    if report.choice is not None:
        parts.append(f"**{report.choice.reason}**")
    parts.append(markdown_table(artifact_columns(report)))
    reason = report.choice.reason if report.choice else None
    parts.append("\n".join(f"- {escape(line)}" for line in footnotes(report) if line != reason))
    if report.ablation:
        parts += ["## Ablation", markdown_table(ablation_columns(report))]
    parts += ["## Limits", markdown_table(limit_columns(report))]
    for heading, columns in (("Training", training_columns(report)), ("Imported models", import_columns(report))):
        if columns:
            parts += [f"## {heading}", markdown_table(columns)]
    if any(r.percentiles for r in report.rows):
        parts += ["## Latency", markdown_table(latency_columns(report))]
    parts += ["## Machine", _pairs(flatten(report.machine))]
    if report.corpus:
        parts += ["## Corpus", _pairs(flatten(report.corpus))]
    if report.stages:
        parts += ["## Stages", markdown_table(stage_columns(report))]
    if report.plan:
        parts += ["## Plan", _pairs(flatten(report.plan))]
    return "\n\n".join(p for p in parts if p) + "\n"


def title(report: Report) -> str:
    """The heading of a report."""
    return ("ryot report" if report.kind == "report" else "ryot measurement record") + f" {report.run_id}"


def facts_line(report: Report) -> str:
    """Command, date and version in one line."""
    facts = [
        f"`{report.command}`",
        report.created_at.replace("T", " ").replace("+00:00", " UTC"),
        f"ryot {report.ryot_version}",
    ]
    if report.preset:
        facts.append(f"preset {report.preset}")
    if report.quick:
        facts.append("quick: not comparable")
    return " · ".join(facts)


def training_columns(report: Report) -> list[Column]:
    """What each training gave, a row per (variant, seed); no rows when nothing was trained."""
    rows = [v for v in report.variants if not v.source]
    if not rows:
        return []

    def column(
        name: str, header: str, get: Callable[[VariantRow], Cell], decimals: int | None = None, needed: bool = False
    ) -> Column:
        return Column(name, header, tuple(get(v) for v in rows), decimals, needed)

    def millions(v: VariantRow) -> float:
        return v.params / 1e6

    star = "*" if any(v.concurrent for v in rows) else ""
    return [
        column("variant", "variant", lambda v: v.name, needed=True),
        column("seed", "seed", lambda v: str(v.seed)),
        column("params", "params\nM", millions, 3, True),
        column("tokens", "tokens\nk", lambda v: None if v.tokens is None else v.tokens / 1e3, 1, True),
        column("train_s", f"train{star}\ns", lambda v: v.train_wall_s, 1, True),
        column("compile_s", "compile\ns", lambda v: v.compile_s, 1),
        column("tokens_per_s", f"tokens/s{star}", lambda v: v.tokens_per_s, 0, True),
        column("initial", "first val loss\nnats", lambda v: v.initial_val_loss, 3),
        column("val_loss", "val loss\nnats", lambda v: v.val_loss, 3, True),
        column("test_loss", "test loss\nnats", lambda v: v.test_loss, 3, True),
        column("test_bpb", "test\nbits/byte", lambda v: v.test_bpb, 4, True),
        column("grad", "largest gradient norm", lambda v: v.grad_norm_max, 2),
        column("to_baseline", f"to baseline's loss{star}\ns", lambda v: v.time_to_baseline_loss_s, 1),
        column("failed", "stopped", lambda v: v.failed or None),
    ]


def import_columns(report: Report) -> list[Column]:
    """The models that were not trained here; no rows when there are none."""
    rows = [v for v in report.variants if v.source]
    if not rows:
        return []
    return [
        Column("variant", "variant", tuple(v.name for v in rows), needed=True),
        Column("params", "params\nM", tuple(v.params / 1e6 for v in rows), 3, needed=True),
        Column("source", "source", tuple(v.source for v in rows), needed=True),
        Column("sha256", "sha256", tuple(v.source_sha256[:16] for v in rows), needed=True),
        Column("failed", "stopped", tuple(v.failed or None for v in rows)),
    ]


def latency_columns(report: Report) -> list[Column]:
    """Load, first and warm latencies, the percentiles that the samples carry, and what the spread comes from."""
    rows = [r for r in report.rows if r.runs_ok]

    def column(name: str, header: str, get: Callable[[ArtifactRow], Cell], decimals: int | None = None) -> Column:
        return Column(name, header, tuple(get(r) for r in rows), decimals, needed=name != "seed")

    def percentile(source: str, p: str) -> Callable[[ArtifactRow], Cell]:
        return lambda row: row.percentiles.get(source, {}).get(p)

    def spread(
        key: Literal["between_rounds", "first_over_rest", "lag1"], scale: float = 1.0, offset: float = 0.0
    ) -> Callable[[ArtifactRow], Cell]:
        def get(row: ArtifactRow) -> float | None:
            value = row.spread.get("ttft_ms", {}).get(key)
            return None if value is None else (value - offset) * scale

        return get

    def outliers(row: ArtifactRow) -> str | None:
        """Positions as round:sample, the first three."""
        found = row.spread.get("ttft_ms", {}).get("outliers")
        if not found:
            return None
        shown = ", ".join(f"{k}:{i}" for k, i in found[:3])
        return shown + (f" and {len(found) - 3} more" if len(found) > 3 else "")

    columns = [
        column("variant", "variant", lambda r: r.variant),
        column("seed", "seed", lambda r: str(r.seed)),
        column("precision", "precision", lambda r: r.precision),
        column("load", "load\nms", lambda r: r.load_ms, 1),
        column("cold", "cold start\nms", lambda r: r.cold_start_ms, 0),
        column("first", "first TTFT\nms", lambda r: r.first_ttft_ms, 2),
        column("ttft", "TTFT\nms", lambda r: r.ttft_ms, 2),
        column("e2e", "TTFT with tokenization\nms", lambda r: r.e2e_ttft_ms, 2),
    ]
    for source, label in (("ttft_ms", "TTFT"), ("token_ms", "token")):
        for p in ("p50", "p90", "p95", "p99"):
            if p == "p50" and source == "ttft_ms":
                continue
            columns.append(column(f"{source}_{p}", f"{label} {p}\nms", percentile(source, p), 3))
    return [
        *columns,
        column("between", "between rounds\n%", spread("between_rounds", 100), 1),
        column("first_over", "first sample\n% over rest", spread("first_over_rest", 100, 1.0), 1),
        column("lag1", "lag-1 correlation", spread("lag1"), 2),
        column("outliers", "outliers\nround:sample", outliers),
    ]


def stage_columns(report: Report) -> list[Column]:
    """How long each stage took."""
    return [
        Column("stage", "stage", tuple(s.stage for s in report.stages), needed=True),
        Column("variant", "variant", tuple(s.variant for s in report.stages)),
        Column("wall", "wall\ns", tuple(s.wall_s for s in report.stages), 1, True),
    ]


def flatten(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            pairs.append((name, " ".join(str(v) for v in value)))
        else:
            pairs.append((name, str(value)))
    return pairs


def escape(text: str) -> str:
    """Text that Markdown shows as it is at the beginning of a list item."""
    return text.replace("*", "\\*").replace("|", "\\|")


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {escape(text)}" for name, text in pairs)
