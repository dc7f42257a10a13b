"""The figures of report.html as inline SVG whose colours are CSS variables, and the numbers behind each as a table.

matplotlib draws with stand-in colours; each stand-in becomes a `var(--…)`, so one drawing serves the light page, the
dark one and paper. Text stays text. Series differ in colour *and* in dash or marker.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ryot.errors import RyotError
from ryot.report.reinforcement import SERIES, passes_of, series_numbers
from ryot.report.rows import ArtifactRow, Report
from ryot.report.samples import samples_of, token_latencies
from ryot.report.table import Cell, Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Stand-in colour -> CSS variable; series colours are Okabe and Ito's, told apart by colour-blind readers too.
_INK, _GRID, _PAPER = "#010101", "#020202", "#030303"
_SERIES = tuple(f"#0400{k:02x}" for k in range(8))
_VARIABLES = {_INK: "--ink", _GRID: "--grid", _PAPER: "--paper", **{c: f"--s{k}" for k, c in enumerate(_SERIES)}}
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_MARKERS = "osD^vPX*"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ryot",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titlecolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
}
_SIZE = (5.0, 3.3)


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: an anchor, a heading, a sentence on how to read it, the drawing and its numbers."""

    name: str
    heading: str
    caption: str
    svg: str
    columns: tuple[Column, ...]


def check_plots() -> None:
    """Raise `RyotError` where figures cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RyotError("report.html needs matplotlib", hint="pip install 'ryot[report]'") from error


def draw_plots(report: Report) -> list[Plot]:
    """Every figure that the report has numbers for. Raises `RyotError` when matplotlib is not installed."""
    check_plots()
    import matplotlib as mpl

    found = []
    with mpl.rc_context(_STYLE):
        if any(v.curve for v in report.variants):
            found += [_loss(report, "tokens"), _loss(report, "time")]
        measured = [r for r in report.rows if r.runs_ok]
        if measured:
            found += [_ttft(measured), _tokens(measured), _frontier(measured), _order(measured)]
        if report.ablation:
            found.append(_ablation(report))
        if any(v.reinforcement for v in report.variants):
            found += [_passes(report), *(_reinforcement(report, name) for name in SERIES)]
    return found


@contextmanager
def _figure(name: str, size: tuple[float, float] = _SIZE) -> Iterator[tuple[Figure, Axes, list[str]]]:
    """A figure, its axes, and a list that holds the SVG afterwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    out: list[str] = []
    yield figure, axes, out
    raw = io.StringIO()
    figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    out.append(inline_svg(raw.getvalue(), name))


def inline_svg(svg: str, name: str) -> str:
    """An SVG file's text made fit to stand in a page: no prologue, ids of its own, colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", svg)
    # Size comes from the page; the view box keeps the proportions.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]+"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]+"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}-heading"', 1)


def label_of(row: ArtifactRow, rows: Sequence[ArtifactRow]) -> str:
    """`optimized int8-dyn`, with the seed where rows differ in it."""
    return f"{row.variant} {row.precision}" + (f" seed {row.seed}" if len({r.seed for r in rows}) > 1 else "")


def _series(k: int) -> dict[str, Any]:
    return {"color": _SERIES[k % len(_SERIES)], "linestyle": _DASHES[k % len(_DASHES)]}


def _loss(report: Report, against: str) -> Plot:
    by_time = against == "time"
    name = f"loss-{against}"
    columns: list[tuple[str, int, float, float, float]] = []
    names = list(dict.fromkeys(v.name for v in report.variants))
    with _figure(name) as (_, axes, out):
        for v in report.variants:
            if not v.curve:
                continue
            x = [p[1] if by_time else p[0] / 1e3 for p in v.curve]
            first = next(w for w in report.variants if w.name == v.name and w.curve)
            axes.plot(x, [p[2] for p in v.curve], label=v.name if v is first else None, **_series(names.index(v.name)))
            columns += [(v.name, v.seed, p[0] / 1e3, p[1], p[2]) for p in v.curve]
        axes.set_xlabel("training time (s)" if by_time else "training tokens (thousands)")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.set_xlim(left=0)
        axes.legend()
    concurrent = " The variants trained at the same time on one machine." if any(
        v.concurrent for v in report.variants
    ) and by_time else ""  # fmt: skip
    return Plot(
        name,
        "Held-out loss against time" if by_time else "Held-out loss against tokens",
        ("Time in training steps only." if by_time else "Each curve ends with its variant's own budget.") + concurrent,
        out[0],
        _columns(("variant", "seed", "tokens (k)", "time (s)", "loss (nats)"), columns, (None, 0, 1, 2, 4)),
    )


def _ttft(rows: Sequence[ArtifactRow]) -> Plot:
    numbers: list[tuple[Cell, ...]] = []
    with _figure("ttft", (_SIZE[0], 1.1 + 0.5 * len(rows))) as (_, axes, out):
        for k, row in enumerate(rows):
            rounds = [r for r in samples_of(row, "ttft_ms") if r]
            for j, samples in enumerate(rounds):
                heights = k + (j - (len(rounds) - 1) / 2) * min(0.18, 0.6 / max(1, len(rounds)))
                axes.scatter(samples, [heights] * len(samples), s=7, alpha=0.45, linewidths=0, color=_SERIES[k % 8])
                axes.scatter([np.median(samples)], [heights], s=42, marker="|", color=_INK, linewidths=1.6)
                numbers.append(
                    (label_of(row, rows), j, len(samples), min(samples), float(np.median(samples)), max(samples))
                )
        axes.set_yticks(range(len(rows)), [label_of(r, rows) for r in rows])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("time to first token (ms)")
        axes.grid(axis="y", visible=False)
    return Plot(
        "ttft",
        "Time to first token",
        "One line of dots per process, one dot per run; the bar is the process's median.",
        out[0],
        _columns(
            ("artifact", "round", "samples", "least (ms)", "median (ms)", "most (ms)"), numbers, (None, 0, 0, 3, 3, 3)
        ),
    )


def _tokens(rows: Sequence[ArtifactRow]) -> Plot:
    numbers: list[tuple[Cell, ...]] = []
    lows, highs = [], []
    with _figure("tokens", (_SIZE[0], 3.8)) as (_, axes, out):
        for k, row in enumerate(rows):
            values = np.sort(token_latencies(row))
            if not len(values):
                continue
            # The slowest 1 in 200 would squeeze everything else together; the table has the tail.
            share = np.linspace(0, 99.5, min(len(values), 300))
            lows.append(values[0])
            highs.append(float(np.percentile(values, 99.5)))
            axes.plot(np.percentile(values, share), share, label=label_of(row, rows), **_series(k))
            carried = row.percentiles.get("token_ms", {})
            numbers.append((label_of(row, rows), len(values), *(carried.get(p) for p in ("p50", "p90", "p95", "p99"))))
        _time_axis(axes, min(lows, default=1.0), max(highs, default=1.0))
        axes.set_xlabel("time between two tokens (ms)")
        axes.set_ylabel("share of tokens at or below (%)")
        _legend_below(axes)
    return Plot(
        "tokens",
        "Inter-token latency",
        "All processes together, up to 99.5 %. The table has only the percentiles that the samples carry.",
        out[0],
        _columns(
            ("artifact", "tokens", "p50 (ms)", "p90 (ms)", "p95 (ms)", "p99 (ms)"), numbers, (None, 0, 3, 3, 3, 3)
        ),
    )  # fmt: skip


def _frontier(rows: Sequence[ArtifactRow]) -> Plot:
    numbers: list[tuple[Cell, ...]] = []
    with _figure("frontier", (_SIZE[0], 4.0)) as (_, axes, out):
        bits = [r.quality.get("bpb") for r in rows]
        known = [b for b in bits if b is not None]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        for k, (row, bpb) in enumerate(zip(rows, bits)):
            share = 0.5 if bpb is None or high == low else (bpb - low) / (high - low)
            size_mb, speed = row.size_bytes / 1e6, row.decode_tok_s or math.nan
            axes.scatter(
                [size_mb], [speed], s=200 - 120 * share, marker=_MARKERS[k % len(_MARKERS)], color=_SERIES[k % 8],
                linewidths=0, zorder=3, label=label_of(row, rows),
            )  # fmt: skip
            if row.chosen:
                axes.scatter([size_mb], [speed], s=480, facecolors="none", edgecolors=_INK, linewidths=1.2, zorder=3)
            numbers.append(
                (
                    label_of(row, rows), size_mb, speed, row.ttft_ms, bpb,
                    "yes" if row.pareto else "no", "yes" if row.chosen else "",
                )
            )  # fmt: skip
        front = sorted((r for r in rows if r.pareto), key=lambda r: r.size_bytes)
        axes.plot(
            [r.size_bytes / 1e6 for r in front], [r.decode_tok_s or math.nan for r in front], color=_INK, linewidth=1,
            linestyle=(0, (2, 2)), zorder=2, label="Pareto front",
        )  # fmt: skip
        axes.set_xlim(0, 1.12 * max(r.size_bytes / 1e6 for r in rows))
        axes.set_ylim(0, 1.15 * max(r.decode_tok_s or 0 for r in rows))
        axes.set_xlabel("size (MB)")
        axes.set_ylabel("decode (tokens/s)")
        _legend_below(axes)
    return Plot(
        "frontier",
        "Size, speed, quality",
        "Up and left is better; a larger mark has fewer bits per byte. The ringed artifact goes into the bundle."
        " On the Pareto front no other artifact is as good in size, TTFT, speed and quality at once.",
        out[0],
        _columns(
            ("artifact", "size (MB)", "tok/s", "TTFT (ms)", "bits/byte", "Pareto", "bundle"),
            numbers,
            (None, 2, 0, 2, 4, None, None),
        ),
    )


def _order(rows: Sequence[ArtifactRow]) -> Plot:
    numbers: list[tuple[Cell, ...]] = []
    with _figure("order", (_SIZE[0], 0.9 + (0.85 if len(rows) < 6 else 0.6) * len(rows))) as (figure, axes, out):
        figure.delaxes(axes)
        panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        relative = [[100 * np.asarray(r) / np.median(r) - 100 for r in samples_of(row, "ttft_ms") if r] for row in rows]
        every = np.concatenate([np.abs(r) for rounds in relative for r in rounds])
        reach = max(3.0, 3 * float(np.percentile(every, 90)))
        for k, (row, panel, rounds) in enumerate(zip(rows, panels, relative)):
            start = 0
            for values in rounds:
                x = np.arange(start, start + len(values))
                panel.plot(x, np.clip(values, -reach, reach), linewidth=1.1, color=_SERIES[k % 8])
                beyond = values > reach
                panel.scatter(x[beyond], [reach] * int(beyond.sum()), s=24, marker="^", color=_INK, zorder=3)
                start += len(values) + 3
            panel.set_title(label_of(row, rows), pad=2)
            panel.set_ylim(-reach, reach * 1.1)
            numbers.append((label_of(row, rows), *_spread_numbers(row)))
        panels[-1].set_xlabel("sample, in order; a gap is a new process")
        figure.supylabel("TTFT against its process's median (%)", fontsize="medium", color=_INK)
    return Plot(
        "order",
        "Where the spread comes from",
        "A first sample above the rest is a first-run effect, a slow wave correlation; a triangle is an outlier beyond"
        " the plot.",
        out[0],
        _columns(
            ("artifact", "between rounds (%)", "first over rest (%)", "lag-1 correlation", "outliers", "round:sample"),
            numbers,
            (None, 1, 1, 2, 0, None),
        ),
    )


def _spread_numbers(row: ArtifactRow) -> tuple[Cell, ...]:
    spread = row.spread.get("ttft_ms", {})
    found = spread.get("outliers") or ()
    first = spread.get("first_over_rest")
    return (
        _percent(spread.get("between_rounds")),
        None if first is None else (first - 1) * 100,
        spread.get("lag1"),
        len(found),
        ", ".join(f"{r}:{i}" for r, i in found[:6]) or "none",
    )


def _ablation(report: Report) -> Plot:
    rows = report.ablation
    base = next((r for r in rows if "+" not in r.name), rows[0])
    base_s, base_loss = float(np.mean(base.train_wall_s)), float(np.mean(base.val_loss))
    numbers: list[tuple[Cell, ...]] = []
    with _figure("ablation", (_SIZE[0], 1.3 + 0.42 * len(rows))) as (figure, axes, out):
        figure.delaxes(axes)
        left, right = figure.subplots(1, 2, sharey=True)
        for k, row in enumerate(rows):
            seconds, loss = float(np.mean(row.train_wall_s)), float(np.mean(row.val_loss))
            left.barh(k, seconds, color=_SERIES[0], height=0.62)
            right.barh(k, loss - base_loss, color=_SERIES[1], height=0.62)
            if len(row.train_wall_s) > 1:
                left.scatter(row.train_wall_s, [k] * len(row.train_wall_s), s=9, color=_INK, zorder=3)
                right.scatter(np.subtract(row.val_loss, base_loss), [k] * len(row.val_loss), s=9, color=_INK, zorder=3)
            numbers.append((row.name, len(row.val_loss), seconds, seconds / base_s, loss, loss - base_loss))
        left.set_yticks(range(len(rows)), [r.name for r in rows])
        left.invert_yaxis()
        left.set_xlabel("training time (s)")
        right.axvline(0, color=_INK, linewidth=0.8)
        right.set_xlabel(f"loss against {base.name} (nats)")
        for a in (left, right):
            a.grid(axis="y", visible=False)
            a.locator_params(axis="x", nbins=4)
    return Plot(
        "ablation",
        "What each optimization bought",
        f"Each one alone on top of {base.name}, and all of them; dots are seeds. Left of zero is a lower loss.",
        out[0],
        _columns(
            ("variant", "seeds", "time (s)", f"of {base.name}", "loss (nats)", "difference (nats)"),
            numbers,
            (None, 0, 1, 3, 3, 3),
        ),
    )


def _passes(report: Report) -> Plot:
    numbers: list[tuple[Cell, ...]] = []
    rows = [row for row in report.variants if row.reinforcement]
    with _figure("passes") as (_, axes, out):
        for k, row in enumerate(rows):
            for name, label in (("pass_at_1", "pass@1"), ("pass_at_k", "pass@k")):
                points = passes_of(row.reinforcement, name)
                steps = [p.step for p in points]
                style: dict[str, Any] = {"color": _SERIES[k % len(_SERIES)], "linestyle": _DASHES[name == "pass_at_k"]}
                axes.plot(steps, [p.value for p in points], label=f"{row.name} seed {row.seed}, {label}", **style)
                band = ([p.low for p in points], [p.high for p in points])
                axes.fill_between(steps, *band, color=_SERIES[k % len(_SERIES)], alpha=0.12, linewidth=0)
                numbers += [(row.name, row.seed, label, p.step, p.value, p.low, p.high) for p in points]
        axes.set_xlabel("steps of reinforcement")
        axes.set_ylabel("share of held-out prompts")
        axes.set_ylim(0, 1)
        _legend_below(axes)
    return Plot(
        "passes",
        "Held-out prompts that are answered right",
        "Bands are 95 % intervals over prompts.",
        out[0],
        _columns(("variant", "seed", "", "step", "share", "low", "high"), numbers, (None, 0, None, 0, 3, 3, 3)),
    )


def _reinforcement(report: Report, name: str) -> Plot:
    heading, unit, caption = SERIES[name]
    numbers = series_numbers(report, name)
    with _figure(f"reinforce-{name}") as (_, axes, out):
        for k, key in enumerate(dict.fromkeys((variant, seed) for variant, seed, _, _ in numbers)):
            points = [(step, value) for variant, seed, step, value in numbers if (variant, seed) == key]
            axes.plot([p[0] for p in points], [p[1] for p in points], label=f"{key[0]} seed {key[1]}", **_series(k))
        axes.set_xlabel("steps of reinforcement")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        if numbers:
            axes.legend()
    columns = _columns(("variant", "seed", "step", unit), numbers, (None, 0, 0, 8 if name == "mismatch" else 3))
    return Plot(f"reinforce-{name}", heading, caption, out[0], columns)


def _legend_below(axes: Axes) -> None:
    """A legend under the axes, where it can't hide a curve."""
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)


def _time_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis with plain numbers where values differ by more than 5 times, else a linear one."""
    if low > 0 and high / low > 5:
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())


def _percent(value: float | None) -> float | None:
    return None if value is None else value * 100


def _columns(
    headers: Sequence[str], rows: Sequence[Sequence[Cell]], decimals: Sequence[int | None]
) -> tuple[Column, ...]:
    return tuple(
        Column(f"c{k}", header, tuple(row[k] for row in rows), decimals[k], needed=True)
        for k, header in enumerate(headers)
    )
