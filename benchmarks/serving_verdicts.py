"""Holds the samples of `serving.py` against what was asked, and writes them down."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Sample = dict[str, Any]
#: Aggregate tokens per second at 16 streams, against llama-server at its best.
AGGREGATE = {"M": 1.5, "SmolLM2": 1.2}


def render(setting: Mapping[str, Any], samples: Sequence[Sample], *, quick: bool) -> str:
    """The result for people."""
    cpu = setting["environment"]["cpu"]
    loads = [sample["load"] for sample in samples]
    lines = [
        "# Serving",
        "",
        f"`{setting['command']}` at commit {setting['commit']}, {cpu['model']}, {cpu['cores']} cores.",
        "",
        *(["**A quick look, not to be quoted.**", ""] if quick else []),
        f"Load average when jobs began: {min(loads, default=0):.1f} to {max(loads, default=0):.1f}"
        " (of other programs above 1).",
        "",
        "## What was asked",
        "",
        "| | model | asked | found | |",
        "|:--|:--|:--|--:|:--|",
        *(_row(*row) for row in _asked(samples)),
        "",
        "## At once",
        "",
        "Prompts of 128 tokens. tok/s over all streams; CPU is the server's own time per token, prompts included.",
        "",
        *_streams(samples, "streams"),
    ]
    for part, title in (("poisson", "Arrivals at random"), ("shared", "1,000 tokens in common at 16 at once")):
        if table := list(_streams(samples, part)):
            lines += ["", f"## {title}", "", *table]
    return "\n".join(lines)


def _row(what: str, model: str, asked: str, found: float | None, holds: bool | None, layout: str = "{:.2f}x") -> str:
    shown = "not taken" if found is None else layout.format(found)
    return f"| {what} | {model} | {asked} | {shown} | {'' if holds is None else 'yes' if holds else 'NO'} |"


def _asked(samples: Sequence[Sample]) -> Iterable[tuple[Any, ...]]:
    """The rows of the issue's table."""
    for name, cores in dict.fromkeys((sample["model"], sample["cores"]) for sample in samples):
        mine = [sample for sample in samples if (sample["model"], sample["cores"]) == (name, cores)]
        model = name if cores == 1 else f"{name}, {cores} cores"

        def all_of(part: str, mine: Sequence[Sample] = mine) -> list[Any]:
            return [sample["found"] for sample in mine if sample["part"] == part]

        if found := all_of("http"):
            ratio = _median_of(x for f in found for x in f["http_tok_s"]) / _median_of(
                x for f in found for x in f["engine_tok_s"]
            )
            yield "tok/s over HTTP at one stream against the engine in process", model, "0.95x", ratio, ratio >= 0.95
            cpu = _median_of(f["engine_cpu_s"] for f in found) / _median_of(f["http_cpu_s"] for f in found)
            yield "the same by CPU time, prompts included", model, "", cpu, None
        for engine, ratio in _against_llama(mine, "16", "tok_s").items():
            what = f"aggregate tok/s at 16 streams, {engine} against llama-server's best"
            yield what, model, f"{AGGREGATE[name]}x", ratio, ratio >= AGGREGATE[name]
        for engine, ratio in _against_llama(mine, "16", "cpu_ms_per_token").items():
            yield f"the same by CPU time per token, {engine}", model, "", ratio, None
        if found := all_of("arrival"):
            with_ms = _median_of(f["with"]["p99_ms"] for f in found if f["with"]["p99_ms"])
            ratio = with_ms / _median_of(f["alone"]["p99_ms"] for f in found)
            yield "p99 between tokens while a prompt of 2,000 arrives", model, "3x at most", ratio, ratio <= 3
        if found := all_of("prefix"):
            ratio = _median_of(x for f in found for x in f["cached_ms"]) / _median_of(
                x for f in found for x in f["computed_ms"]
            )
            yield "TTFT with 1,000 tokens cached against computed", model, "0.15x", ratio, ratio <= 0.15
        for engine, ratio in _against_llama(mine, "1", "ttft_ms").items():
            yield f"p50 TTFT at one stream, {engine} against llama-server's best", model, "0.5x", ratio, ratio <= 0.5
        batches: dict[str, list[float]] = {}
        for sample in mine:
            if sample["part"] == "batch":
                ratio = sample["found"]["batch_tok_s"] / sample["found"]["single_tok_s"]
                batches.setdefault(sample["engine"], []).append(ratio)
        for engine, ratios in batches.items():
            holds = _median_of(ratios) >= 2.5 if name == "M" else None
            yield (
                f"batch against single requests, {engine}",
                model,
                "2.5x" if name == "M" else "",
                _median_of(ratios),
                holds,
            )
        if (found := all_of("json")) and any(f["json"] for f in found):
            ratio = _median_of(x for f in found for x in f["json"]) / _median_of(x for f in found for x in f["free"])
            yield "constrained JSON, tok/s against free", model, "0.9x", ratio, ratio >= 0.9
        for found in all_of("soak"):
            growth = found["rss_mb"][-1] / found["rss_mb"][len(found["rss_mb"]) // 5]
            failed = found["failed"] + sum(found["rows_held"].values())
            what = f"{found['requests']} requests, {found['cancelled']} cut off: memory"
            yield what, model, "1.02x at most", growth, growth <= 1.02, "{:.3f}x"
            yield "of these failed, or rows still held", model, "0", failed, failed == 0, "{:.0f}"
        if found := all_of("start"):
            extra = _median_of(x for f in found for x in f["ready_s"]) - _median_of(
                x for f in found for x in f["cold_s"]
            )
            yield "start to ready beyond a bundle's cold start", model, "0.5 s", extra, extra <= 0.5, "{:.2f} s"


def _against_llama(samples: Sequence[Sample], at_once: str, figure: str) -> dict[str, float]:
    """Ours by llama-server's best, by engine: of rates the larger is better, of times the smaller."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        if sample["part"] == "streams" and at_once in sample["found"]:
            value = sample["found"][at_once][figure]
            values.setdefault(sample["engine"], []).append(_median_of(value) if isinstance(value, list) else value)
    theirs = [_median_of(found) for name, found in values.items() if name.startswith("llama")]
    if not theirs:
        return {}
    best = max(theirs) if figure == "tok_s" else min(theirs)
    ours = {name: _median_of(found) for name, found in values.items() if name.startswith("ryot")}
    return {name: best / value if figure == "cpu_ms_per_token" else value / best for name, value in ours.items()}


def _streams(samples: Sequence[Sample], part: str) -> Iterable[str]:
    found: dict[tuple[str, int, str, str], list[Sample]] = {}
    missing = []
    for sample in samples:
        if sample["part"] != part:
            continue
        if reason := sample["found"].get("missing"):
            missing.append(f"{sample['model']}, {sample['engine']}: {reason}")
        for load, figures in sample["found"].items():
            if isinstance(figures, dict):
                found.setdefault((sample["model"], sample["cores"], load, sample["engine"]), []).append(figures)
    if found:
        yield "| model | cores | load | server | tok/s | CPU ms per token | TTFT p50 ms | p95 | failed |"
        yield "|:--|--:|--:|:--|--:|--:|--:|--:|--:|"
    for (model, cores, load, engine), rounds in sorted(found.items(), key=_order):
        ttft = [value for figures in rounds for value in figures["ttft_ms"]]
        cells = [model, str(cores), load, engine, f"{_median_of(f['tok_s'] for f in rounds):.0f}"]
        cells.append(f"{_median_of(f['cpu_ms_per_token'] for f in rounds):.3f}")
        cells += [f"{np.quantile(ttft, q):.1f}" if ttft else "" for q in (0.5, 0.95)]
        yield f"| {' | '.join(cells)} | {sum(f['failed'] for f in rounds)} |"
    if missing:
        yield ""
    yield from (f"Not taken: {reason}." for reason in dict.fromkeys(missing))


def _order(item: tuple[tuple[str, int, str, str], Any]) -> tuple[Any, ...]:
    model, cores, load, engine = item[0]
    return model, cores, int(load.rstrip("%")), engine


def _median_of(values: Iterable[float]) -> float:
    return statistics.median(values)
