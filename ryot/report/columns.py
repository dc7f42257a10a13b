"""The columns of a report's tables: what stands in each, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

from ryot.report.rows import AblationRow, ArtifactRow, Cause, Comparison, Report, VariantRow, Verdict
from ryot.report.table import Cell, Column, ratio_text
from ryot.report.targets import LIMITS
from ryot.report.verdicts import memory_mode, overall


class Looks(TypedDict, total=False):
    """Fields of `Column` that say how it is shown."""

    decimals: int
    needed: bool
    first: bool


def artifact_columns(report: Report) -> list[Column]:
    """The columns of the main table, one row per artifact."""
    rows = report.rows
    trainings = [report.variant_of(r) for r in rows]
    star = "*" if any(v and v.concurrent for v in trainings) else ""
    imported = any(v and v.source for v in trainings)

    def column(name: str, header: str, get: Callable[[ArtifactRow], Cell], **options: Unpack[Looks]) -> Column:
        return Column(name, header, tuple(get(r) for r in rows), **options)

    def training(name: str, header: str, get: Callable[[VariantRow], Cell], **options: Unpack[Looks]) -> Column:
        return Column(name, header, tuple(None if v is None else get(v) for v in trainings), **options)

    several = any(r.device for r in rows)
    columns = [
        *([column("device", "device", lambda r: r.device, needed=True, first=True)] if several else []),
        column("variant", "variant", lambda r: r.variant, needed=True, first=True),
        column("seed", "seed", lambda r: str(r.seed), first=True),
        column("precision", "precision", lambda r: r.precision, needed=True, first=True),
        training("params", "params\nM", lambda v: v.params / 1e6, decimals=2, first=True),
        training("train_s", f"train{star}\ns", lambda v: v.train_wall_s, decimals=1, first=True),
        training("loss", "loss\nnats", _held_out_loss, decimals=2, first=True),
        # The one loss that means the same under any tokenizer.
        *([column("bpb", "bits\n/byte", lambda r: r.quality.get("bpb"), decimals=3, first=True)] if imported else []),
        column("size_mb", "size\nMB", lambda r: r.size_bytes / 1e6, decimals=2, needed=True, first=True),
        column("ttft_ms", "TTFT\nms", lambda r: r.ttft_ms, needed=True, first=True),
        column("decode_tok_s", "decode\ntok/s", lambda r: r.decode_tok_s, decimals=0, needed=True, first=True),
        column("peak_rss_mb", "memory\nMB", _peak_mb, decimals=1, needed=True, first=True),
        column("bpb_ratio", "bpb\nratio", lambda r: r.quality.get("bpb_ratio"), decimals=4),
        column("kl", "KL\nnats", lambda r: r.quality.get("kl"), decimals=4),
        column("top1", "top-1\n%", lambda r: _percent(r.quality.get("top1")), decimals=1),
        *(
            Column(f"batch_{n}_tok_s", f"batch {n}\ntok/s", tuple(r.batch_tok_s.get(n) for r in rows), decimals=0)
            for n in dict.fromkeys(n for r in rows for n in r.batch_tok_s)
        ),
        column("ttft_ratio", "TTFT ratio\n[98 %]", lambda r: baseline_ratio_text(report, r, "ttft_ms")),
        column(
            "tok_s_ratio", "tok/s ratio\n[98 %]", lambda r: baseline_ratio_text(report, r, "decode_tok_s"), first=True
        ),
        column(
            "memory_ratio", "memory\nratio", lambda r: baseline_ratio_text(report, r, "peak_rss_bytes", interval=False)
        ),
        column("size_ratio", "size\nratio", lambda r: baseline_ratio_text(report, r, "size_bytes", interval=False)),
    ]
    for name in (str(target["name"]) for target in report.targets):
        words = tuple(verdict_text(r, name) for r in rows)
        columns.append(Column(f"verdict_{name}", name, words, needed=True, first=True, status=words))
    return columns


def limit_columns(report: Report) -> list[Column]:
    """The columns of the second table: the chosen (or nearest) artifact's limits, and what others miss."""
    chosen = report.choice.id if report.choice else None
    kept = [v for v in report.verdicts if chosen and v.id == chosen]
    kept += [v for v in report.verdicts if v.id != chosen and v.verdict != "PASS"]
    if not kept:
        kept = list(report.verdicts)
    several_seeds = len({v.seed for v in kept}) > 1
    names = tuple(f"{v.variant} {v.precision}" + (f" seed {v.seed}" if several_seeds else "") for v in kept)
    devices = tuple(v.device for v in kept)
    return [
        Column("artifact", "artifact", names),
        *([Column("device", "device", devices, needed=True)] if any(devices) else []),
        Column("target", "target", tuple(v.target for v in kept), needed=True),
        Column("limit", "limit", tuple(limit_text(v) for v in kept), needed=True),
        Column("value", "value [98 %]", tuple(value_text(v) for v in kept), needed=True),
        Column(
            "verdict",
            "verdict",
            tuple(_verdict_and_mode(report, v) for v in kept),
            needed=True,
            status=tuple(v.verdict for v in kept),
        ),
    ]


def ablation_columns(report: Report) -> list[Column]:
    """What each optimization bought against the baseline, in time and in loss; no rows when nothing was ablated."""
    rows = report.ablation
    if not rows:
        return []
    base = rows[0]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def spread(row: AblationRow) -> str | None:
        return f"{min(row.val_loss):.3f} to {max(row.val_loss):.3f}" if len(row.val_loss) > 1 else None

    return [
        Column("variant", "variant", tuple(r.name for r in rows), needed=True),
        Column("seeds", "seeds", tuple(str(len(r.val_loss)) for r in rows), right=True),
        Column("time", "time\ns", tuple(mean(r.train_wall_s) for r in rows), 1, needed=True),
        Column(
            "time_ratio", "of the\nbaseline", tuple(mean(r.train_wall_s) / mean(base.train_wall_s) for r in rows), 2
        ),
        Column("loss", "val loss\nnats", tuple(mean(r.val_loss) for r in rows), 3, needed=True),
        Column("change", "change\nnats", tuple(mean(r.val_loss) - mean(base.val_loss) for r in rows), 3),
        Column("spread", "seeds from\nto", tuple(map(spread, rows))),
    ]


def limit_text(verdict: Verdict) -> str:
    """`TTFT ≤ 120 ms`"""
    kind = LIMITS[verdict.limit_key]
    unit = "" if kind.unit == "ratio" else f" {kind.unit}"
    return f"{kind.title} {kind.sign} {verdict.limit:g}{unit}"


def value_text(verdict: Verdict) -> str:
    """`3.21 [3.11, 3.32] ms`, without the interval for exact figures."""
    if verdict.value is None:
        return "not measured"
    kind = LIMITS[verdict.limit_key]
    if kind.unit == "ratio":
        return f"{verdict.value:.4f}"
    unit = f" {kind.unit}"
    if verdict.low is None or verdict.high is None or verdict.low == verdict.high:
        return f"{_digits(verdict.value)}{unit}"
    return f"{_digits(verdict.value)} [{_digits(verdict.low)}, {_digits(verdict.high)}]{unit}"


def baseline_ratio_text(report: Report, row: ArtifactRow, metric: str, *, interval: bool = True) -> str:
    """The ratio to the baseline with its interval, `=` behind it for no difference."""
    if str(row.id) == report.baseline:
        return "1"
    found = find_comparison(report, row, metric)
    if found is None:
        return "-"
    if not interval:
        return f"{found.ratio:.2f}"
    return ratio_text(found.ratio, found.low, found.high, 2) + (" =" if found.verdict == "no difference" else "")


def find_comparison(report: Report, row: ArtifactRow, metric: str) -> Comparison | None:
    """The comparison of an artifact with the baseline in one metric."""
    return next((c for c in report.comparisons if c.a == str(row.id) and c.metric == metric), None)


def verdict_text(row: ArtifactRow, target: str) -> str:
    """The artifact's overall word for a target; `GATE` for one that a parity or quality gate stopped."""
    return overall(row.verdicts.get(target, {})) if row.passed else "GATE"


def _verdict_and_mode(report: Report, verdict: Verdict) -> str:
    row = report.row_of(verdict.id)
    if verdict.cause is Cause.DIED and row is not None:
        return f"{verdict.verdict} ({row.runs - row.runs_ok} of {row.runs} died)"
    if verdict.value is None:
        return verdict.verdict
    if verdict.metric == "memory" and row is not None:
        return f"{verdict.verdict} ({memory_mode(row, verdict.limit)})"
    return verdict.verdict


def _held_out_loss(training: VariantRow) -> float | None:
    return training.test_loss if training.test_loss is not None else training.val_loss


def _peak_mb(row: ArtifactRow) -> float | None:
    return None if row.peak_rss_bytes is None else row.peak_rss_bytes / 1e6


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def _digits(number: float) -> str:
    """Four significant digits without an exponent."""
    decimals = max(0, 3 - math.floor(math.log10(abs(number)))) if number else 0
    text = f"{number:.{min(decimals, 4)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
