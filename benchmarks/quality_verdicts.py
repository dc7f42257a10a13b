"""Holds the samples of `quality_speed.py` against what was asked, and writes them down for people.

A ratio is theirs over ours in time, round by round, with its 98 % interval; it passes where it reaches what was asked.
Bits per byte are compared window by window: a point is no worse than another where the ratio of their losses is at most
1, or at most `SAME_BPB` with an interval that holds 1, which is what the rounding of a cache or a scale moves it by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ryot.report.stats import Interval, median_of_rounds, ratio_interval, t_quantile

MB = 1e6
SAME_BPB = 1.001
#: Decode of ours over these at no worse bits per byte, and time to first token.
DECODE_ASKED = {"Q8_0": 1.1, "Q4_K_M": 1.1}
TTFT_ASKED = 2.0
MAX_SIZE_RATIO = 1.1


@dataclass(frozen=True)
class View:
    """The points of a result at one number of threads."""

    values: Mapping[str, Any]
    threads: str

    @property
    def points(self) -> dict[str, Mapping[str, Any]]:
        return {point["name"]: point for point in self.values["made"]["points"]}

    def ours(self) -> list[str]:
        return [name for name, point in self.points.items() if point["family"] == "ryot"]

    def peers(self) -> list[str]:
        return [name for name, point in self.points.items() if point["family"] != "ryot"]

    @property
    def ttfts(self) -> list[str]:
        lengths = self.values["lengths"]
        return [f"ttft@{length}" for length in (lengths["prompt"], lengths["long_prompt"])]

    @property
    def decodes(self) -> list[str]:
        lengths = self.values["lengths"]
        return [f"token@{depth}" for depth in (*lengths["depths"], lengths["long_depth"])]

    def samples(self, name: str, metric: str) -> list[list[float]]:
        measured = self.values["threads"][self.threads]["points"].get(name, {"series": {}})
        return list(measured["series"].get(metric, []))

    def median(self, name: str, metric: str) -> float | None:
        rounds = self.samples(name, metric)
        return median_of_rounds(rounds) if any(rounds) else None

    def bpb(self, name: str) -> float | None:
        value = self.values["quality"]["points"].get(name, {}).get("bpb")
        return None if value is None else float(value)

    def speedup(self, ours: str, theirs: str, metric: str) -> Interval | None:
        """Their time over ours: above 1 we are faster."""
        return ratio_interval(self.samples(theirs, metric), self.samples(ours, metric))

    def loss_ratio(self, ours: str, theirs: str) -> Interval | None:
        """Our loss over theirs on the same windows; None where one has none."""
        found = [self.values["quality"]["points"].get(name, {}).get("nats") for name in (ours, theirs)]
        if None in found:
            return None
        a, b = (np.asarray(nats) for nats in found)
        ratio = float(a.sum() / b.sum())
        if len(a) < 2:
            return Interval(ratio, ratio, ratio, len(a))
        # A ratio of sums, linearized: its error is that of the sum of what each window leaves.
        left = a - ratio * b
        half = t_quantile(len(a) - 1) * float(left.std(ddof=1)) * math.sqrt(len(a)) / float(b.sum())
        return Interval(ratio, ratio - half, ratio + half, len(a))

    def no_worse(self, ours: str, theirs: str) -> bool:
        ratio = self.loss_ratio(ours, theirs)
        return ratio is not None and (ratio.value <= 1 or (ratio.value <= SAME_BPB and ratio.holds(1)))


def judge(values: Mapping[str, Any], threads: str) -> list[dict[str, Any]]:
    """A row for each figure asked, and one for each peer that a point of ours has to match in everything."""
    view = View(values, threads)
    rows = []
    for peer, asked in DECODE_ASKED.items():
        rows += [_judge_ratio(view, peer, metric, asked) for metric in view.decodes]
        rows += [_judge_ratio(view, peer, metric, TTFT_ASKED) for metric in view.ttfts]
    return rows + [_judge_peer(view, peer) for peer in view.peers()]


def _judge_ratio(view: View, peer: str, metric: str, asked: float) -> dict[str, Any]:
    """The best of our points that are no worse than the peer."""
    kind, _, length = metric.partition("@")
    what = f"decode at depth {length}" if kind == "token" else f"TTFT of {length} tokens"
    row: dict[str, Any] = {"goal": f"{what}: {asked:g}x {peer} at no worse bits per byte", "verdict": "not measured"}
    if peer not in view.points or view.bpb(peer) is None:
        return row
    able = [name for name in view.ours() if view.no_worse(name, peer)]
    found = {name: ratio for name in able if (ratio := view.speedup(name, peer, metric))}
    if not found:
        unscored = not any(view.bpb(name) for name in view.ours())
        return row | ({} if unscored or able else {"verdict": "FAIL", "text": "no point of ours is no worse"})
    best = max(found, key=lambda name: found[name].value)
    ratio, loss = found[best], view.loss_ratio(best, peer)
    assert loss is not None
    verdict = "PASS" if ratio.value >= asked else f"FAIL by {1 - ratio.value / asked:.0%}"
    if ratio.low < asked <= ratio.high:
        verdict += ", interval holds what was asked"
    text = f"{best}: {_interval(ratio)}x, bits per byte {_interval(loss, 5)} of {peer}'s"
    return row | {"verdict": verdict, "text": text, "ours": best, "ratio": [ratio.value, ratio.low, ratio.high]}


def _judge_peer(view: View, peer: str) -> dict[str, Any]:
    """Whether one point of ours is at least as good in everything; else what the nearest one lacks."""
    goal = f"one of ours at least as good as {peer} in bits per byte, TTFT, decode, at most {MAX_SIZE_RATIO}x its size"
    metrics = [*view.ttfts, *view.decodes]
    found: dict[str, tuple[float, str, list[str]]] = {}
    for name in view.ours():
        ratios = {metric: view.speedup(name, peer, metric) for metric in metrics}
        loss = view.loss_ratio(name, peer)
        if loss is None or not any(ratios.values()):
            continue
        size = view.points[name]["size_bytes"] / view.points[peer]["size_bytes"]
        lacks = [f"{metric} {r.value:.2f}x" for metric, r in ratios.items() if r and r.value < 1]
        lacks += [f"{metric} not measured" for metric, r in ratios.items() if r is None]
        lacks += [] if view.no_worse(name, peer) else [f"bits per byte {loss.value:.4f}"]
        lacks += [] if size <= MAX_SIZE_RATIO else [f"size {size:.2f}x"]
        # How far the worst of the figures is from what is asked, in the figure's own ratio.
        worst = min([min(r.value, 1) for r in ratios.values() if r] + [min(1, MAX_SIZE_RATIO / size)])
        if not view.no_worse(name, peer):
            worst = min(worst, 1 / loss.value)
        speeds = ", ".join(f"{metric} {r.value:.2f}x" for metric, r in ratios.items() if r)
        found[name] = (worst, f"{name}: bits per byte {loss.value:.4f}, {speeds}, size {size:.2f}x", lacks)
    if not found:
        return {"goal": goal, "verdict": "not measured"}
    best = min(found, key=lambda name: (len(found[name][2]), -found[name][0]))
    _, text, lacks = found[best]
    return {"goal": goal, "verdict": "PASS" if not lacks else f"FAIL: {', '.join(lacks)}", "text": text, "ours": best}


def render(values: Mapping[str, Any]) -> str:
    """The result for people."""
    cpu, lengths = values["environment"]["cpu"], values["lengths"]
    changed = f", {values['changed_files']} tracked files changed" if values["changed_files"] else ""
    lines = [f"# Quality and speed beside other quantizations, {cpu['model']}, commit {values['commit']}{changed}", ""]
    if values["quick"]:
        lines += ["**A quick run with tiny lengths: it says that the benchmark works, and nothing else.**", ""]
    if not values["complete"]:
        lines += ["Stopped at its time limit: not every point has all rounds. The same command goes on.", ""]
    for threads in values["threads"]:
        view = View(values, threads)
        lines += [f"## {threads} thread{'s' * (threads != '1')}", "", *_render_points(view), _why(view), ""]
        lines += ["| asked | found | verdict |", "|:--|:--|:--|"]
        for row in values["verdicts"][threads]:
            lines.append(f"| {row['goal']} | {row.get('text', '')} | {row['verdict']} |")
        lines.append("")
    return "\n".join([*lines, *_render_method(values, lengths)])


def _render_points(view: View) -> list[str]:
    lengths = view.values["lengths"]
    heads = ["point", "engine", "bits/byte", "KL", "top-1 %", "MB"]
    heads += [f"TTFT {length} ms" for length in (lengths["prompt"], lengths["long_prompt"])]
    heads += [f"tok/s @ {depth}" for depth in (*lengths["depths"], lengths["long_depth"])]
    heads += ["peak RSS MB", "cold start ms"]
    lines = [f"| {' | '.join(heads)} |", f"|:--|:--|{'--:|' * (len(heads) - 2)}"]
    for name, point in view.points.items():
        bpb = view.bpb(name)
        score = view.values["quality"]["points"].get(name, {})
        cells = [name, point["family"], "" if bpb is None else f"{bpb:.4f}"]
        cells += ["" if score.get("kl") is None else f"{score['kl']:.4f}"]
        cells += ["" if score.get("top1") is None else f"{score['top1']:.1%}".removesuffix("%")]
        cells += [f"{point['size_bytes'] / MB:.1f}"]
        cells += [_spread(view.samples(name, metric)) for metric in view.ttfts]
        cells += [
            _spread([[1e3 / ms for ms in some] for some in view.samples(name, metric)]) for metric in view.decodes
        ]
        cells += [_spread([[v / MB for v in some] for some in view.samples(name, "rss")])]
        cells += [_spread(view.samples(name, "cold"))]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "Medians of the rounds' medians; in brackets the smallest and the largest sample.", ""]


def _why(view: View) -> str:
    """What the figures are bound by, in one paragraph."""
    bandwidths = [max(some) for some in view.values["threads"][view.threads]["bandwidth"] if some]
    shallow, deep = view.decodes[0], view.decodes[-1]
    named = _named(view)
    parts = []
    if bandwidths:
        top = float(np.median(bandwidths))
        parts.append(f"Why: one core reads {top / 1e9:.1f} GB/s of arrays of tens of MB (numpy, in the same rounds).")
        shares = []
        for name in named:
            ms, step_bytes = view.median(name, shallow), view.points[name]["step_bytes"]
            if ms and step_bytes:
                rate = step_bytes / ms * 1e3
                shares.append(f"{name} {step_bytes / MB:.0f} MB and {rate / 1e9:.1f} GB/s ({rate / top:.0%})")
        if shares:
            parts.append(
                "A decode step at the shallowest depth reads its weights: " + ", ".join(shares) + ". One near that "
                "rate is bound by memory and only fewer bytes make it faster; one far below is bound by its kernels."
            )
    growth = []
    for name in named:
        at = [view.median(name, metric) for metric in (shallow, deep)]
        if at[0] and at[1]:
            growth.append(f"{name} {at[1] - at[0]:.2f}")
    if growth:
        parts.append(f"From there to depth {deep.partition('@')[2]} a token takes, in ms more: {', '.join(growth)}.")
    prefill = _best(view, view.ttfts[0])
    if prefill:
        length = int(view.ttfts[0].partition("@")[2])
        parts.append(
            "A prompt is bound by arithmetic: the fastest reads "
            + ", ".join(f"{length / ms * 1e3:.0f} tokens/s ({name})" for name, ms in prefill)
            + "."
        )
    return " ".join(parts)


def _named(view: View) -> list[str]:
    """The points that verdicts were about, and the fastest of each side."""
    rows = view.values["verdicts"][view.threads]
    names = {row.get("ours") for row in rows} | set(DECODE_ASKED) | {n for m in view.decodes for n, _ in _best(view, m)}
    return [name for name in view.points if name in names]


def _best(view: View, metric: str) -> list[tuple[str, float]]:
    """The fastest of ours and of theirs."""
    found = []
    for names in (view.ours(), view.peers()):
        times = {name: ms for name in names if (ms := view.median(name, metric))}
        if times:
            name = min(times, key=lambda n: times[n])
            found.append((name, times[name]))
    return found


def _render_method(values: Mapping[str, Any], lengths: Mapping[str, Any]) -> list[str]:
    made, quality = values["made"], values["quality"]
    environment = values["environment"]
    agree, tokens = quality["agree"], made["tokens_equal"]
    scored = lengths["windows"] * (lengths["window"] - lengths["window"] // 2 - 1)
    lines = ["## How", ""]
    lines.append(
        f"`{values['command']}`; cores {values['cores']}; {', '.join(environment['cpu']['isa'])}; kernel "
        f"{environment['kernel']}, Python {environment['python']}, "
        + ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
        + f". {values['rounds']} rounds; a fresh process for each point, kind of job and round, in random order. Load "
        + ", ".join(
            f"{run['load'][0]:.1f} to {run['load'][1]:.1f} ({threads} threads)"
            for threads, run in values["threads"].items()
            if run["load"]
        )
        + "."
    )
    if types := made["source_tensors"]:
        total = sum(types.values())
        shares = ", ".join(f"{kind} {count / total:.1%}" for kind, count in types.items())
        lines += ["", f"The weights come from a GGUF file ({shares} of the values), made float32 before anything else."]
    lines += [
        "",
        "llama.cpp's F16 of them is the reference of its types, our fp32 that of our bundles; bits per byte are "
        "absolute, on equal tokens; KL, in nats per token, and top-1 are to that reference. "
        f"llama-perplexity's protocol: {lengths['windows']} windows of {lengths['window']} "
        f"tokens, the second half scored, {scored:,} tokens. A pair's bits per byte are the worse of its halves. "
        "Tokens: "
        + ("our tokenizer gives llama.cpp's ids" if tokens["equal"] else "ids differ, llama.cpp's are scored")
        + (f", each window begins with token {tokens['bos']}" if tokens["bos"] is not None else ", no bos")
        + ". "
        + (
            f"Our fp32 over llama.cpp's F16: {agree['ratio']:.5f} ({'PASS' if agree['ok'] else 'FAIL'}, within "
            f"{agree['limit']:.1%})."
            if agree
            else "fp32 and F16 were not both scored."
        ),
        "",
        "llama.cpp's speed is llama-bench's, which draws random tokens and hands none of them over; its cache is "
        "float16. Ours and the builders' hand each token to Python, with a float32 cache (kv8: int8). Caches are "
        "allocated before the timing. The start of ours is from the process's to the first token, of ids; "
        "llama-completion's reads its prompt as text. Peak RSS is VmHWM after "
        f"{lengths['prompt']} + {lengths['cold_steps']} tokens, with room for no more.",
    ]
    details = next(iter(values["threads"].values()))["points"]
    named = [f"{name}: {d['details'].get('short', '')}" for name, d in details.items() if d["details"].get("short")]
    flags = next((d["details"]["cold"] for n, d in details.items() if n == "F16" and "cold" in d["details"]), "")
    if flags:
        lines += ["", f"llama.cpp was built with: {flags}."]
    lines += ["", f"Engines: {'; '.join(named)}."] if named else []
    notes = [*made["notes"], *(f"exported {what} in {s:.0f} s" for what, s in made["export_s"].items())]
    notes += [f"{n}: not scored, {q['failed']}" for n, q in quality["points"].items() if "failed" in q]
    for threads, run in values["threads"].items():
        notes += [f"{n}, {threads} threads: {f}" for n, d in run["points"].items() for f in d["failed"]]
    return [*lines, "", *(f"- {note}" for note in notes)]


def _spread(rounds: Sequence[Sequence[float]]) -> str:
    values = [value for some in rounds for value in some]
    if not values:
        return ""
    return f"{_short(median_of_rounds(rounds))} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _interval(found: Interval, digits: int = 3) -> str:
    return f"{found.value:.{digits}g} ({found.low:.{digits}g} to {found.high:.{digits}g})"


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, bits per byte) those that no other one beats in both, by cost."""
    best: list[tuple[float, float]] = []
    for cost, bpb in sorted(points):
        if not best or bpb < best[-1][1]:
            best.append((cost, bpb))
    return best
