"""Draws the frontiers of `quality_speed.py`: bits per byte against decode and against time to first token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quality_verdicts import View, frontier

#: Okabe and Ito's colours, told apart by colour-blind readers too; each family has a marker of its own.
STYLES = {
    "ryot": ("#0072B2", "o"),
    "llama.cpp": ("#D55E00", "s"),
    "genai": ("#009E73", "D"),
    "mobius": ("#CC79A7", "^"),
}


def draw_frontiers(values: Mapping[str, Any], path: Path) -> None:
    """An SVG with a row for each number of threads; lines join what no other point of the same side beats."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ryot", "font.size": 8})
    rows = list(values["threads"])
    first = View(values, rows[0])
    metrics = [first.ttfts[0], *first.decodes[:2]]
    figure, axes = plt.subplots(len(rows), len(metrics), figsize=(4.2 * len(metrics), 3.6 * len(rows)), squeeze=False)
    for row, threads in enumerate(rows):
        view = View(values, threads)
        for column, metric in enumerate(metrics):
            _draw(axes[row][column], view, metric)
            axes[row][column].set_title(f"{threads} thread{'s' * (threads != '1')}", loc="left")
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][-1].legend(handles, labels, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw(axes: Any, view: View, metric: str) -> None:
    kind, _, length = metric.partition("@")
    found: dict[str, list[tuple[float, float]]] = {}
    for name, point in view.points.items():
        ms, bpb = view.median(name, metric), view.bpb(name)
        if ms is None or bpb is None:
            continue
        found.setdefault(point["family"], []).append((ms, bpb))
        axes.annotate(name, (_shown(kind, ms), bpb), xytext=(3, 3), textcoords="offset points", fontsize=6)
    for family, points in found.items():
        colour, marker = STYLES[family]
        xs, ys = zip(*((_shown(kind, ms), bpb) for ms, bpb in points))
        axes.plot(xs, ys, marker, color=colour, label=family, markersize=4)
    for families, colour in (
        (["ryot"], STYLES["ryot"][0]),
        ([f for f in found if f != "ryot"], STYLES["llama.cpp"][0]),
    ):
        line = frontier(p for family in families for p in found.get(family, []))
        axes.plot([_shown(kind, ms) for ms, _ in line], [bpb for _, bpb in line], color=colour, linewidth=0.9)
    axes.set_ylabel("bits per byte")
    if kind == "token":
        axes.set_xlabel(f"decode, tokens/s at depth {length} (right is better)")
    else:
        axes.set_xlabel(f"time to first token, ms, prompt of {length} (left is better)")
        axes.set_xscale("log")
    axes.grid(alpha=0.3, linewidth=0.5)


def _shown(kind: str, ms: float) -> float:
    return 1e3 / ms if kind == "token" else ms
