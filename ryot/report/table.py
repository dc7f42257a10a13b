"""The tables of a report: for the terminal (at most 100 columns), Markdown, CSV and JSON, from the same rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tabulate import tabulate

from ryot.report.rows import AblationRow, Comparison, FormRow, Report, VariantRow, Verdict, report_to_dict
from ryot.report.targets import LIMITS
from ryot.report.verdicts import memory_mode, overall

Format = Literal["table", "md", "csv", "json"]
FORMATS: tuple[Format, ...] = ("table", "md", "csv", "json")
WIDTH = 100
_GAP = 2

Cell = float | str | None


@dataclass(frozen=True, slots=True)
class Column:
    """One column: what its header says, what stands in it, and whether it may go when it doesn't vary."""

    name: str
    header: str
    """Lines of the header; the last one is the unit."""
    cells: tuple[Cell, ...]
    decimals: int | None = None
    """None for text and for a number of decimals taken from the values."""
    needed: bool = False
    """Kept even when all rows agree."""
    first: bool = False
    """Belongs into the first block of the terminal's table as long as it fits."""
    right: bool = False
    """Aligned right although the cells are text."""

    def texts(self) -> list[str]:
        """The cells as text, all with the same number of decimals."""
        numbers = [c for c in self.cells if isinstance(c, (int, float)) and math.isfinite(c)]
        decimals = self.decimals if self.decimals is not None else decimals_for(numbers)
        return [c if isinstance(c, str) else "-" if c is None else f"{c:.{decimals}f}" for c in self.cells]

    def width(self) -> int:
        return max(len(line) for text in (self.header, *self.texts()) for line in text.split("\n"))

    @property
    def is_text(self) -> bool:
        return not self.right and all(isinstance(c, str) or c is None for c in self.cells)


def decimals_for(numbers: Sequence[float]) -> int:
    """Decimals that leave three significant digits to the smallest number above 0; at most 4."""
    smallest = min((abs(n) for n in numbers if n), default=1.0)
    return min(4, max(0, 2 - math.floor(math.log10(smallest))))


def render(report: Report, fmt: Format = "table", *, width: int = WIDTH) -> str:
    """The report as text in one of FORMATS; `width` holds for the terminal's table."""
    if fmt == "json":
        return json.dumps(report_to_dict(report), indent=1, allow_nan=False)
    if fmt == "csv":
        return render_csv(report)
    if fmt == "md":
        tables = (form_columns(report), ablation_columns(report), limit_columns(report))
        return "\n\n".join(t for t in map(markdown_table, tables) if t)
    blocks = [
        *form_blocks(form_columns(report), width),
        plain_table(ablation_columns(report)),
        *limit_blocks(report, width),
    ]
    return "\n\n".join([b for b in blocks if b] + ["\n".join(wrap(line, width) for line in footnotes(report))])


def form_columns(report: Report) -> list[Column]:
    """The columns of the main table, one row a form."""
    rows = report.rows
    trainings = [report.variant_of(r) for r in rows]
    star = "*" if any(v and v.concurrent for v in trainings) else ""

    def column(name: str, header: str, get: Callable[[FormRow], Cell], **options: Any) -> Column:
        return Column(name, header, tuple(get(r) for r in rows), **options)

    def training(name: str, header: str, get: Callable[[VariantRow], Cell], **options: Any) -> Column:
        return Column(name, header, tuple(None if v is None else get(v) for v in trainings), **options)

    columns = [
        column("variant", "variant", lambda r: r.variant, needed=True, first=True),
        column("seed", "seed", lambda r: str(r.seed), first=True),
        column("precision", "precision", lambda r: r.precision, needed=True, first=True),
        training("params", "params\nM", lambda v: v.params / 1e6, decimals=2, first=True),
        training("train_s", f"train{star}\ns", lambda v: v.train_wall_s, decimals=1, first=True),
        training("loss", "loss\nnats", _held_out_loss, decimals=2, first=True),
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
        column("ttft_ratio", "TTFT ratio\n[98 %]", lambda r: ratio_text(report, r, "ttft_ms")),
        column("tok_s_ratio", "tok/s ratio\n[98 %]", lambda r: ratio_text(report, r, "decode_tok_s"), first=True),
        column("memory_ratio", "memory\nratio", lambda r: ratio_text(report, r, "peak_rss_bytes", interval=False)),
        column("size_ratio", "size\nratio", lambda r: ratio_text(report, r, "size_bytes", interval=False)),
    ]
    for name in (str(target["name"]) for target in report.targets):
        words = tuple(verdict_text(r, name) for r in rows)
        columns.append(Column(f"verdict_{name}", name, words, needed=True, first=True))
    return columns


def limit_columns(report: Report) -> list[Column]:
    """The columns of the second table: the chosen (or nearest) form's limits, and what other forms miss."""
    choice = report.choice
    chosen = (choice.variant, choice.seed, choice.precision) if choice else None
    kept: list[Verdict] = []
    if chosen and chosen[0]:
        kept = [v for v in report.verdicts if _form_of(v) == chosen]
    kept += [v for v in report.verdicts if _form_of(v) != chosen and v.verdict != "PASS"]
    if not kept:
        kept = list(report.verdicts)
    several_seeds = len({v.seed for v in kept}) > 1
    forms = tuple(f"{v.variant} {v.precision}" + (f" seed {v.seed}" if several_seeds else "") for v in kept)
    return [
        Column("form", "form", forms),
        Column("target", "target", tuple(v.target for v in kept), needed=True),
        Column("limit", "limit", tuple(limit_text(v) for v in kept), needed=True),
        Column("value", "value [98 %]", tuple(value_text(v) for v in kept), needed=True),
        Column("verdict", "verdict", tuple(_verdict_and_mode(report, v) for v in kept), needed=True),
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


def limit_blocks(report: Report, width: int) -> list[str]:
    """The second table; one a form, under its name, where a single one would be wider than `width`."""
    columns = limit_columns(report)
    whole = plain_table(columns)
    if max(map(len, whole.splitlines()), default=0) <= width:
        return [whole]
    blocks = []
    for form in dict.fromkeys(columns[0].cells):
        kept = [k for k, cell in enumerate(columns[0].cells) if cell == form]
        part = [dataclasses.replace(c, cells=tuple(c.cells[k] for k in kept)) for c in columns[1:]]
        blocks.append(f"{form}\n{plain_table(part)}")
    return blocks


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


def ratio_text(report: Report, row: FormRow, metric: str, *, interval: bool = True) -> str:
    """`1.52 [1.48, 1.56]` against the baseline, `=` behind it for no difference."""
    if row.arm == report.baseline:
        return "1"
    found = find_comparison(report, row.arm, metric)
    if found is None:
        return "-"
    equal = " =" if found.verdict == "no difference" and interval else ""
    if not interval or found.low is None or found.high is None:
        return f"{found.ratio:.2f}{equal}"
    return f"{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}]{equal}"


def find_comparison(report: Report, arm: str, metric: str) -> Comparison | None:
    """The comparison of an arm (or a variant's training) with the baseline in one metric."""
    return next((c for c in report.comparisons if c.a == arm and c.metric == metric), None)


def verdict_text(row: FormRow, target: str) -> str:
    """The form's overall word for a target; `GATE` for one that a parity or quality gate stopped."""
    return overall(row.verdicts.get(target, {})) if row.passed else "GATE"


def footnotes(report: Report) -> list[str]:
    """The lines below the tables: what the columns mean, the choice and the warnings."""
    lines = []
    same = constant_columns(form_columns(report)) if len(report.rows) > 1 else []
    if same:
        lines.append("Same for all rows: " + ", ".join(_constant_text(c) for c in same) + ".")
    base = report.row_of(report.baseline)
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


def form_blocks(columns: Sequence[Column], width: int) -> list[str]:
    """The main table as one block, or as several below each other where one would be wider than `width`."""
    shown = varying_columns(columns)
    keys = [c for c in shown if c.name in ("variant", "seed", "precision")]
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


def varying_columns(columns: Sequence[Column]) -> list[Column]:
    """The columns worth showing: needed ones, and those in which rows differ; never one without any value.

    Of a single row everything is shown but a ratio to itself.
    """

    def worth(column: Column) -> bool:
        texts = column.texts()
        return column.needed or len(set(texts)) > 1 or (len(texts) == 1 and texts[0] != "1")

    return [c for c in columns if worth(c) and any(v is not None for v in c.cells)] or list(columns)


def constant_columns(columns: Sequence[Column]) -> list[Column]:
    """The columns that `varying_columns` leaves out although they have a value."""
    shown = varying_columns(columns)
    return [c for c in columns if c not in shown and c.cells and c.texts()[0] not in ("-", "1")]


def plain_table(columns: Sequence[Column]) -> str:
    """The terminal's table of these columns; empty for no rows."""
    shown = varying_columns(columns)
    if not shown or not shown[0].cells:
        return ""
    # The header goes in as rows: tabulate would pad every column to its header plus two.
    height = max(c.header.count("\n") for c in shown) + 1
    headers = [c.header.split("\n") for c in shown]
    head = list(zip(*(lines + [""] * (height - len(lines)) for lines in headers)))
    dashes = ["-" * c.width() for c in shown]
    body = list(zip(*(c.texts() for c in shown)))
    return _tabulate([*head, dashes, *body], shown, "plain", headers=())


def markdown_table(columns: Sequence[Column]) -> str:
    """The same as a Markdown table; headers on one line."""
    shown = varying_columns(columns)
    if not shown or not shown[0].cells:
        return ""
    return _tabulate(list(zip(*(c.texts() for c in shown))), shown, "pipe", headers=[one_line(c.header) for c in shown])


def _tabulate(lines: Sequence[Sequence[str]], columns: Sequence[Column], fmt: str, headers: Sequence[str]) -> str:
    text: str = tabulate(
        lines,
        headers=headers,
        tablefmt=fmt,
        disable_numparse=True,
        colalign=["left" if c.is_text else "right" for c in columns],
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def one_line(header: str) -> str:
    """`TTFT (ms)` for a header of two lines."""
    title, _, unit = header.partition("\n")
    return f"{title} ({unit.strip('[]')})" if unit else title


def render_csv(report: Report) -> str:
    """One line a form with every figure in full precision; the header names carry the units."""
    rows = report.rows
    columns: dict[str, list[Any]] = {}
    for column in form_columns(report):
        if not column.name.endswith("_ratio") or column.name == "bpb_ratio":
            columns[column.name] = list(column.cells)
    for metric in ("ttft_ms", "decode_tok_s", "peak_rss_bytes", "load_ms"):
        for k, end in enumerate(("low", "high")):
            columns[f"{metric}_{end}"] = [r.intervals[metric][k] if metric in r.intervals else None for r in rows]
    for metric in ("ttft_ms", "decode_tok_s", "peak_rss_bytes", "size_bytes"):
        found = [find_comparison(report, r.arm, metric) for r in rows]
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


def wrap(text: str, width: int) -> str:
    """The text broken between words so that no line is longer than `width`, where its words allow it."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "  " + word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def _constant_text(column: Column) -> str:
    title, _, unit = column.header.partition("\n")
    return f"{title} {column.texts()[0]}" + (f" {unit}" if unit and not unit.startswith("[") else "")


def _verdict_and_mode(report: Report, verdict: Verdict) -> str:
    row = next((r for r in report.rows if _form_of(r) == _form_of(verdict)), None)
    if "processes failed" in verdict.note and row is not None:
        return f"{verdict.verdict} ({row.runs - row.runs_ok} of {row.runs} died)"
    if verdict.value is None:
        return verdict.verdict
    if verdict.metric == "memory" and row is not None:
        return f"{verdict.verdict} ({memory_mode(row, verdict.limit)})"
    return verdict.verdict


def _form_of(item: FormRow | Verdict) -> tuple[str, int, str]:
    return item.variant, item.seed, item.precision


def _held_out_loss(training: VariantRow) -> float | None:
    return training.test_loss if training.test_loss is not None else training.val_loss


def _peak_mb(row: FormRow) -> float | None:
    return None if row.peak_rss_bytes is None else row.peak_rss_bytes / 1e6


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def _digits(number: float) -> str:
    """Four significant digits without an exponent."""
    decimals = max(0, 3 - math.floor(math.log10(abs(number)))) if number else 0
    text = f"{number:.{min(decimals, 4)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
