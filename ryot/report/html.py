"""report.html: one file that needs no network, for a screen, a phone, a dark room and paper."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ryot.report.columns import artifact_columns, limit_columns
from ryot.report.markdown import (
    facts_line,
    flatten,
    import_columns,
    latency_columns,
    stage_columns,
    title,
    training_columns,
)
from ryot.report.plots import Plot, draw_plots
from ryot.report.render import footnotes
from ryot.report.rows import Report
from ryot.report.table import Column, varying_columns

#: Nothing may be loaded from anywhere; styles are the page's own.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1d2129; --soft: #5b6472; --grid: #d5d9e0;
  --good: #0a7a3d; --bad: #b3261e; --unsure: #8a5a00;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #aa4499; --s4: #b58900; --s5: #3f8fc7; --s6: #555555;
  --s7: #cc3311; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1c2027; --ink: #e7eaef; --soft: #9aa4b2;
  --grid: #39414d; --good: #5ed693; --bad: #ff8a80; --unsure: #ffc766;
  --s0: #56b4e9; --s1: #ff9a4d; --s2: #3fd0a4; --s3: #e08fd6; --s4: #f0d264; --s5: #9ccbff; --s6: #bbbbbb;
  --s7: #ff7a66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .15rem; }
p { margin: .4rem 0; } .soft, figcaption { color: var(--soft); font-size: .875rem; }
.choice { border-left: 4px solid var(--good); background: var(--card); padding: .75rem 1rem; margin: 1rem 0;
  font-size: 1.05rem; border-radius: 0 6px 6px 0; }
.choice.missed { border-color: var(--bad); }
ul.notes { margin: .75rem 0; padding-left: 1.2rem; font-size: .875rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { vertical-align: bottom; font-weight: 600; } th small { display: block; font-weight: 400; color: var(--soft); }
.text { text-align: left; } tr.chosen td { background: var(--card); font-weight: 600; }
.artifacts th:first-child, .artifacts td:first-child { position: sticky; left: 0; background: var(--paper); }
.artifacts tr.chosen td:first-child { background: var(--card); }
.PASS { color: var(--good); font-weight: 600; } .FAIL, .GATE { color: var(--bad); font-weight: 600; }
.INCONCLUSIVE { color: var(--unsure); font-weight: 600; }
.plots { display: grid; align-items: start; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 1rem; min-width: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; margin: .5rem 0; }
details { margin-top: .5rem; font-size: .875rem; } summary { cursor: pointer; color: var(--soft); }
details .scroll { max-height: 20rem; overflow: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .875rem; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
@media (max-width: 40rem) { body { padding: 1rem .75rem 3rem; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .35rem; } th, td { padding: .3rem .5rem; } figure { padding: .75rem; } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --grid: #bbb; color-scheme: light;
  --good: #0a7a3d; --bad: #b3261e; --unsure: #8a5a00;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #aa4499; --s4: #b58900; --s5: #3f8fc7; --s6: #555; --s7: #c31; }
  body { max-width: none; padding: 0; font-size: 10pt; } .plots { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .2rem .35rem; }
  h2 { break-after: avoid; } }
""".strip()


def render_html(report: Report) -> str:
    """The whole page. Raises `RyotError` when matplotlib is not installed."""
    parts = [
        f"<h1>{_text(title(report))}</h1>",
        f'<p class="soft">{_text(facts_line(report).replace("`", ""))}</p>',
        _choice(report),
        "<h2>Artifacts</h2>",
        html_table(_verdicts_first(artifact_columns(report)), chosen=[r.chosen for r in report.rows]),
        _notes(report),
        "<h2>Limits</h2>",
        html_table(limit_columns(report)),
        _sources(report),
    ]
    plots = draw_plots(report)
    if plots:
        parts += ["<h2>Plots</h2>", '<div class="plots">', *(_plot(p) for p in plots), "</div>"]
    for heading, columns in (("Training", training_columns(report)), ("Imported models", import_columns(report))):
        if columns:
            parts += [f"<h2>{heading}</h2>", html_table(columns)]
    if any(r.runs_ok for r in report.rows):
        parts += ["<h2>Latency</h2>", html_table(latency_columns(report))]
    parts += ["<h2>Machine</h2>", _pairs(flatten(report.machine))]
    if report.corpus:
        parts += ["<h2>Corpus</h2>", _pairs(flatten(report.corpus))]
    if report.stages:
        parts += ["<h2>Stages</h2>", html_table(stage_columns(report))]
    if report.plan:
        parts += ["<h2>Plan</h2>", _pairs(flatten(report.plan))]
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title(report))}</title>\n"
        # Without an icon of its own a served page would make the browser ask for one.
        '<link rel="icon" href="data:,">\n'
        f"<style>\n{_CSS}\n</style>\n</head>\n<body>\n" + "\n".join(p for p in parts if p) + "\n</body>\n</html>\n"
    )


def html_table(columns: Sequence[Column], chosen: Sequence[bool] | None = None) -> str:
    """A table that scrolls sideways inside the page; cells with a status are coloured, and their words stay."""
    shown = varying_columns(columns)
    if not shown or not shown[0].cells:
        return ""
    head = "".join(f"<th{_side(c)}>{_header(c.header)}</th>" for c in shown)
    texts = [c.texts() for c in shown]
    lines = []
    for k in range(len(shown[0].cells)):
        mark = ' class="chosen"' if chosen and chosen[k] else ""
        cells = "".join(f"<td{_side(c, k)}>{_text(t[k])}</td>" for c, t in zip(shown, texts))
        lines.append(f"<tr{mark}>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _verdicts_first(columns: Sequence[Column]) -> list[Column]:
    """The verdicts moved behind the artifact's name, where a narrow screen still shows them."""
    names = [c for c in columns if c.name in ("variant", "seed", "precision")]
    words = [c for c in columns if c.name.startswith("verdict_")]
    return [*names, *words, *(c for c in columns if c not in names and c not in words)]


def _plot(plot: Plot) -> str:
    name = html.escape(plot.name)
    return (
        f'<figure id="{name}"><h3 id="{name}-heading">{_text(plot.heading)}</h3>'
        f"<figcaption>{_text(plot.caption)}</figcaption>\n{plot.svg}\n"
        f"<details><summary>Numbers</summary>{html_table(plot.columns)}</details></figure>"
    )


def _choice(report: Report) -> str:
    if report.choice is None:
        return ""
    missed = "" if report.choice.exit_code == 0 else " missed"
    return f'<p class="choice{missed}">{_text(report.choice.reason)}</p>'


def _notes(report: Report) -> str:
    reason = report.choice.reason if report.choice else None
    lines = [line for line in footnotes(report) if line != reason]
    return '<ul class="notes">' + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _sources(report: Report) -> str:
    """Where the limits come from, folded away."""
    pairs = [
        (f"{target['name']}: {key}", str(source))
        for target in report.targets
        for key, source in (target.get("sources") or {}).items()
    ]
    return f"<details><summary>Where these limits come from</summary>{_pairs(pairs)}</details>" if pairs else ""


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs)
    return f"<dl>{lines}</dl>" if lines else ""


def _header(header: str) -> str:
    name, _, unit = header.partition("\n")
    return _text(name) + (f"<small>{_text(unit.strip('[]'))}</small>" if unit else "")


def _side(column: Column, row: int | None = None) -> str:
    words = ["text"] if column.is_text else []
    if row is not None and column.status:
        words.append(column.status[row])
    return f' class="{" ".join(words)}"' if words else ""


def _text(text: str) -> str:
    return html.escape(text, quote=False)
