"""Holds the samples of `edge_vs_peers.py` against what was asked, and writes them down for people.

A row compares the best of our artifacts with the best of theirs, both by the median over rounds, each named. The ratio
is the median of the rounds' ratios. `PASS` says that it reaches what was asked; where its interval reaches to the other
side, the verdict says so. Rows without a figure asked are there for the whole picture, as are those of a chosen
artifact of 4 bits against peers of 8 or the other way round: what was asked there was asked of equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ryot.report.stats import median_of_rounds, ratio_interval, value_interval

#: Figures asked were taken on a core with these; without them int8 kernels do half the work an instruction.
ASKED_ON = "an AMD Zen 4 core with AVX-512 and VNNI"
MB = 1e6
#: What the Python binding and numpy may add to the resident size asked, in MB.
BINDING_MB = 20
#: A bare Python where the figures asked were taken.
BARE_ASKED_MB = 8.6
#: What the name of an artifact of ours with an int8 cache ends with.
KV8 = " kv8"
ONE_SESSION = ("fp32", *(artifact + cache for artifact in ("int8-dyn", "int8", "int4") for cache in ("", KV8)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A row: theirs over ours in a time."""

    title: str
    metric: str
    ours: tuple[str, ...] = ()
    """Artifacts of ours that may stand for us, with either cache; all when empty."""
    float_cache: bool = False
    """Whether only artifacts with a float32 cache may, as genai has one and llama.cpp one in float16."""
    theirs: Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
    """Whether a case is the peer, by its description and the tool's decision."""
    asked: Mapping[str, float] = field(default_factory=dict)


def _family(name: str, artifact: str = "") -> Callable[[Mapping[str, Any], Mapping[str, Any]], bool]:
    return lambda case, decision: case["family"] == name and case["artifact"].startswith(artifact)


def _genai(precision: str, block: int | None) -> Callable[[Mapping[str, Any], Mapping[str, Any]], bool]:
    """genai in blocks of this size; None for the size that the tool chose."""

    def fits(case: Mapping[str, Any], decision: Mapping[str, Any]) -> bool:
        size = block or (decision.get("settings") or decision["quantize"])[f"{precision}_block_size"]
        return case["family"] == "genai" and case["artifact"] == f"{precision} block {size}"

    return fits


INT8, INT4 = ("int8", "int8-dyn+int8"), ("int4", "int8-dyn+int4")
_TTFT = (
    ("TTFT, genai", _family("genai"), (2.2, 2.0, 2.4)),
    (
        "TTFT, genai, default block",
        lambda case, _: case["family"] == "genai" and case["artifact"].endswith("block 32"),
        (),
    ),
    ("TTFT, llama.cpp's best", _family("llama.cpp"), (1.6, 2.0, 2.1)),
)
_DECODE = (
    ("torch without cache", (), _family("torch", "fp32, no cache"), (120, 65, 50)),
    ("torch with KV cache", (), _family("torch", "fp32, KV cache"), ()),
    ("plain export", (), _family("plain"), (3.2, 4.5, 3.5)),
    ("int8, genai default block", INT8, _genai("int8", 32), (1.15, 1.3, 1.1)),
    ("int8, genai our block", INT8, _genai("int8", None), (1.05, 1.0, 1.0)),
    ("int4, genai default block", INT4, _genai("int4", 32), ()),
    ("int4, genai our block", INT4, _genai("int4", None), ()),
    ("int8, llama.cpp Q8_0", INT8, _family("llama.cpp", "Q8_0"), (1.5, 1.2, 1.05)),
    ("int4, llama.cpp Q4_0", INT4, _family("llama.cpp", "Q4_0"), (1.35, 1.0, 0.95)),
)


def _list_ratios() -> Iterator[Ratio]:
    """Every row of a ratio; one of a weight format comes with either cache, and again with a float32 cache alone."""
    for title, theirs, asked in _TTFT:
        yield Ratio(title=title, metric="ttft_ms", theirs=theirs, asked=dict(zip("SML", asked)))
    for title, ours, theirs, asked in _DECODE:
        ratio = Ratio(
            title=f"decode, {title}" if not ours else f"decode {title}",
            metric="token_ms",
            ours=ours,
            theirs=theirs,
            asked=dict(zip("SML", asked)),
        )
        yield ratio
        if ours:
            yield replace(ratio, title=f"{ratio.title}, our cache float32", float_cache=True)


RATIOS = tuple(_list_ratios())
RSS_MB, COLD_MS = {"S": 48, "M": 105, "L": 245}, {"S": 70, "M": 170, "L": 480}
#: Batch 16 against batch 1, and decode time at depth 480 against 32 with a float and an int8 cache.
BATCH, DEPTH = {"S": 1.9, "M": 3.0}, {"": 1.5, KV8: 1.25}


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every row of a size: best artifacts first, then those of the bundles that the tool would choose."""
    decision = result["decision"]
    rows = _judge_artifacts(result, "best artifact", None)
    rows += _judge_batches(result) + _judge_depths(result)
    latency, one_session = decision["latency"], decision["one_session"]
    groups = {f"tool's choice for latency: {latency}": latency}
    if one_session != latency:
        groups[f"tool's choice for one session: {one_session}"] = one_session
    groups[f"tool's choice for latency with `--kv-cache int8`: {latency}{KV8}"] = latency + KV8
    for group, artifact in groups.items():
        rows += _judge_artifacts(result, group, artifact)
    return rows


def _judge_artifacts(result: Mapping[str, Any], group: str, artifact: str | None) -> list[dict[str, Any]]:
    size, cases = result["size"], result["cases"]
    rows = []
    for ratio in RATIOS:
        if artifact is not None and ratio.float_cache:
            continue
        ours = [n for n, a in cases.items() if a["family"] == "ryot" and _allowed(a["artifact"], ratio, artifact)]
        theirs = [n for n, a in cases.items() if ratio.theirs(a, result["decision"])]
        # What was asked of artifacts of 8 bits says nothing of an artifact of 4, and the other way round.
        other_bits = artifact is not None and ratio.ours and ("int4" in artifact) != (ratio.ours == INT4)
        asked = None if other_bits else ratio.asked.get(size)
        row = _row(size, group, ratio.title, asked, "x")
        if ours and theirs:
            mine, other = _fastest(cases, ours, ratio.metric), _fastest(cases, theirs, ratio.metric)
            samples = [_samples(cases[name], ratio.metric) for name in (other, mine)]
            found = ratio_interval(*samples)
            assert found is not None
            row |= {"reached": found.value, "low": found.low, "high": found.high, "ours": mine, "theirs": other}
            row |= {"ours_ms": median_of_rounds(samples[1]), "theirs_ms": median_of_rounds(samples[0])}
            row["void"] = _void(result, mine, other)
        rows.append(_with_verdict(row, at_least=True))
    cold = result["cold"]
    for title, metric, asked, unit, scale, via in (
        ("peak RSS, one session", "peak_rss_bytes", RSS_MB[size], "MB", MB, "capi"),
        ("the same, Python binding", "peak_rss_bytes", RSS_MB[size] + BINDING_MB, "MB", MB, "python"),
        ("cold start to first token", "cold_start_ms", COLD_MS[size], "ms", 1.0, "capi"),
    ):
        pool = ONE_SESSION if artifact is None else (artifact,)
        names = [n for n, c in cold.items() if c["family"] == "ryot" and c["engine"] == via and c["artifact"] in pool]
        if metric == "peak_rss_bytes" and artifact is not None and artifact not in ONE_SESSION:
            title, limit = "peak RSS, two sessions", None  # what was asked is for one copy of the weights
        else:
            limit = asked
        row = _row(size, group, title, limit, unit)
        if names:
            best = min(names, key=lambda n: median_of_rounds([[v] for v in cold[n][metric]]))
            found = value_interval([[v / scale] for v in cold[best][metric]])
            assert found is not None
            row |= {"reached": found.value, "low": found.low, "high": found.high, "ours": best}
            row["void"] = _void(result, best)
        if names or artifact is None:
            rows.append(_with_verdict(row, at_least=False))
    return rows


def _judge_batches(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens per second of 16 rows over those of one, the best artifact of each; and among those of 8 bits alone, which
    is what the figure asked for was set with: a fast artifact of 4 bits at batch 1 lowers the ratio."""
    batches = {name: ms for name, ms in result.get("batch", {}).items() if ms}
    if not batches:
        return []

    def best(batch: int, start: str) -> str:
        names = [n for n in batches if n.startswith(start) and n.endswith(f" x {batch}")]
        return min(names, key=lambda n: median_of_rounds([[v] for v in batches[n]]))

    rows = []
    for title, start in (("decode, batch 16 over batch 1", ""), ("the same, artifacts of 8 bits", "int8")):
        one, many = best(1, start), best(16, start)
        found = ratio_interval([[16 * v] for v in batches[one]], [[v] for v in batches[many]])
        assert found is not None
        row = _row(result["size"], "best artifact", title, BATCH[result["size"]], "x")
        row |= {"reached": found.value, "low": found.low, "high": found.high, "void": _void(result)}
        rows.append(_with_verdict(row | {"ours": f"{many} / capi", "theirs": f"{one} / capi"}, at_least=True))
    return rows


def _judge_depths(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Time per token at depth 480 over that at 32, of each artifact; what was asked holds for the faster one at 32."""
    depths = {name: ms for name, ms in result.get("depth", {}).items() if ms}
    rows = []
    for suffix, asked in DEPTH.items():
        artifacts = [f for f in (f"int8{suffix}", f"int4{suffix}") if f"{f} @ 480" in depths and f"{f} @ 32" in depths]
        fastest = min(artifacts, key=lambda f: median_of_rounds([[v] for v in depths[f"{f} @ 32"]]), default=None)
        for artifact in artifacts:
            found = ratio_interval(
                [[v] for v in depths[f"{artifact} @ 480"]], [[v] for v in depths[f"{artifact} @ 32"]]
            )
            assert found is not None
            cache = "int8 cache" if suffix else "float cache"
            title = f"time a token, depth 480 over 32, {cache}"
            row = _row(result["size"], "best artifact", title, asked if artifact == fastest else None, "x")
            row |= {"reached": found.value, "low": found.low, "high": found.high, "void": _void(result)}
            rows.append(_with_verdict(row | {"ours": f"{artifact.removesuffix(suffix)} / capi"}, at_least=False))
    return rows


def _row(size: str, group: str, title: str, asked: float | None, unit: str) -> dict[str, Any]:
    return {"size": size, "group": group, "title": title, "asked": asked, "unit": unit, "reached": None, "void": ""}


def _with_verdict(row: dict[str, Any], *, at_least: bool) -> dict[str, Any]:
    asked, reached = row["asked"], row["reached"]
    if reached is None:
        verdict = "not measured"
    elif row["void"]:
        verdict = f"VOID: {row['void']}"
    elif asked is None:
        verdict = ""
    else:
        passed = reached >= asked if at_least else reached <= asked
        verdict = "PASS" if passed else f"short by {abs(1 - reached / asked):.0%}"
        if row["low"] < asked < row["high"]:
            verdict += ", interval holds what was asked"
    return row | {"verdict": verdict}


def _allowed(artifact: str, ratio: Ratio, only: str | None) -> bool:
    if only:
        return artifact == only
    if ratio.float_cache and artifact.endswith(KV8):
        return False
    return not ratio.ours or artifact.removesuffix(KV8) in ratio.ours


def _samples(case: Mapping[str, Any], metric: str) -> list[list[float]]:
    return [r[metric] for r in case["rounds"]]


def _fastest(cases: Mapping[str, Any], names: Sequence[str], metric: str) -> str:
    return min(names, key=lambda n: median_of_rounds(_samples(cases[n], metric)))


def _void(result: Mapping[str, Any], *names: str) -> str:
    """Why the figures of these cases, and of our own, mean nothing; empty when they do."""
    families = {"ryot", *(result["cases"].get(n, result["cold"].get(n, {})).get("family") for n in names)}
    for name, check in result["check"].items():
        if check["family"] not in families:
            continue
        if check.get("missing"):
            return f"tokens of {name} could not be compared"
        if check["wrong_at"] is not None:
            return f"{name} makes another token at {check['wrong_at']}"
    return ""


def render(values: Mapping[str, Any]) -> str:
    """The result for people."""
    cpu = values["environment"]["cpu"]
    packages = ", ".join(f"{name} {version}" for name, version in values["packages"].items())
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in cpu["caches"].items())
    changed = f", {values['changed_files']} tracked files changed" if values["changed_files"] else ""
    lines = [
        f"# The edge runtime beside its peers, {cpu['model']}, commit {values['commit']}{changed}",
        "",
        f"`{values['command']}` on core {values['core']}, {values['threads']} thread; "
        f"{', '.join(cpu['isa'])}; {caches}; kernel {values['environment']['kernel']}, "
        f"Python {values['environment']['python']}; {packages}.",
        "",
        "Random weights, one checkpoint a size for all. Prompt of 128 tokens, batch 1, greedy, every token handed to "
        "Python; TTFT is from token ids to the first token. Engines take turns in each round in random order, each in "
        "its own process, after untimed tokens. Ratios are theirs to ours in time (above 1: we are faster) with their "
        "98 % interval over rounds. Torch computes the head for the last position only. genai runs the standard graph "
        "of our bundle, with a float32 cache; llama.cpp has an f16 cache, flash attention off or on, all matrices in "
        "the type named. Artifacts of ours whose names end with kv8 have an int8 cache, the others a float32 one.",
        "",
    ]
    for size, result in values["sizes"].items():
        lines += _render_size(size, result)
    return "\n".join(lines)


def _render_size(size: str, result: Mapping[str, Any]) -> list[str]:
    plan, cfg = result["plan"], result["config"]
    lines = [
        f"## {size}: {result['parameters'] / MB:.1f} M parameters, vocabulary {cfg['vocab_size']}, context "
        f"{cfg['max_seq_len']}",
        "",
        f"{plan['rounds']} rounds of {plan['turns']} turns of {plan['steps']} steps ({plan['slow_steps']} for torch "
        f"without cache) after {result['warmup_turns']} whole untimed turns, and {plan['cold_rounds']} fresh processes "
        f"of each; {result['wall_s']:.0f} s, load average {result['load_average'][0]:.1f} before and "
        f"{result['load_average'][1]:.1f} after.",
        "",
        *_render_rows(result["rows"]),
        *_render_short(result),
        *_render_cases(result),
        *_render_cold(result),
        *_render_bound(result),
        *_render_check(result),
        "What the tool measured and chose:",
        "",
        "```",
        result["decision"]["text"],
        "```",
        "",
    ]
    if result["notes"]:
        lines += ["Notes:", "", *(f"- {note}" for note in result["notes"]), ""]
    return lines


def _render_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [f"**{group[0].upper()}{group[1:]}**", ""]
        lines += [
            "| figure | asked | reached | 98 % interval | ours | against | verdict |",
            "|:--|--:|--:|--:|:--|:--|:--|",
        ]
        for row in rows:
            if row["group"] != group:
                continue
            asked = "" if row["asked"] is None else f"{row['asked']:g} {row['unit']}"
            cells = [row["title"], asked, "", "", row.get("ours", ""), row.get("theirs", ""), row["verdict"]]
            if row["reached"] is not None:
                cells[2] = f"{row['reached']:.3g} {row['unit']}"
                cells[3] = f"{row['low']:.3g} to {row['high']:.3g}"
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def _render_short(result: Mapping[str, Any]) -> list[str]:
    """Each row of our best artifacts that is short, with what its times are bound by."""
    lines = []
    for row in result["rows"]:
        if not row["verdict"].startswith("short") or row["group"] != "best artifact":
            continue
        text = f"- {row['title']}: {row['verdict'].split(',')[0]}"
        if row["unit"] == "MB":
            bare = result["bare_python_bytes"] / MB
            text += f"; {bare:.1f} MB of it are Python itself, {BARE_ASKED_MB:g} MB where the figure comes from"
        if "ours_ms" in row:
            text += (
                f"; ours {row['ours_ms']:.3g} ms ({row['ours']}), theirs {row['theirs_ms']:.3g} ms ({row['theirs']})"
            )
            share = _share_of_bound(result, row["ours"]) if row["title"].startswith("decode") else None
            if share is not None:
                text += f"; our step takes {share:.0%} of the read bandwidth"
        lines.append(text + ".")
    if not lines:
        return []
    head = f"Short of what was asked (figures asked were taken on {ASKED_ON}):"
    return [head, "", *lines, ""]


def _render_cases(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "| artifact / engine | TTFT ms | 98 % | decode tok/s | 98 % | version |",
        "|:--|--:|--:|--:|--:|:--|",
    ]
    for name, case in result["cases"].items():
        ttft = value_interval(_samples(case, "ttft_ms"))
        rate = value_interval([[1e3 / v for v in r] for r in _samples(case, "token_ms")])
        assert ttft is not None and rate is not None
        lines.append(
            f"| {name} | {ttft.value:.4g} | {ttft.low:.4g} to {ttft.high:.4g} | {rate.value:,.4g} "
            f"| {rate.low:,.4g} to {rate.high:,.4g} | {case['detail']} |"
        )
    return [*lines, ""]


def _render_cold(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Fresh processes: the start of Python, load, first token; peak resident size (VmHWM) after "
        f"{result['plan']['cold_steps']} more tokens. A Python that does nothing has "
        f"{result['bare_python_bytes'] / MB:.1f} MB.",
        "",
        "| artifact / engine | cold start ms | range | peak RSS MB | range |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name, cold in result["cold"].items():
        start, peak = cold["cold_start_ms"], [b / MB for b in cold["peak_rss_bytes"]]
        lines.append(
            f"| {name} | {median_of_rounds([[v] for v in start]):.4g} | {min(start):.4g} to {max(start):.4g} "
            f"| {median_of_rounds([[v] for v in peak]):.4g} | {min(peak):.4g} to {max(peak):.4g} |"
        )
    return [*lines, ""]


def _render_bound(result: Mapping[str, Any]) -> list[str]:
    bandwidth = result["bandwidth"]
    names, rounds = list(bandwidth["bytes"]), [r for r in bandwidth["rounds"] if r]
    if not rounds:
        return []
    lines = [
        "Share of the bandwidth bound: bytes that a step reads (weights, and the cache at half of the steps) over the "
        "bandwidth of reading as many with numpy on this core, in the same rounds, over the step's time. Bandwidth: "
        + ", ".join(
            f"{median_of_rounds([[r[i]] for r in rounds]) / 1e9:.3g} GB/s at {bandwidth['bytes'][name] / MB:.4g} MB"
            for i, name in enumerate(names)
        )
        + ".",
        "",
        "| artifact / engine | MB per step | share of the bound |",
        "|:--|--:|--:|",
    ]
    for name, case in result["cases"].items():
        share = _share_of_bound(result, name)
        if share is not None:
            lines.append(f"| {name} | {_step_bytes(result, case) / MB:.4g} | {share:.0%} |")
    return [*lines, ""]


def _share_of_bound(result: Mapping[str, Any], name: str) -> float | None:
    case, bandwidth = result["cases"][name], result["bandwidth"]
    rounds = [r for r in bandwidth["rounds"] if r]
    if case["family"] != "ryot" or not rounds:
        return None
    index = list(bandwidth["bytes"]).index(_decode_artifact(case["artifact"]))
    bytes_per_s = median_of_rounds([[r[index]] for r in rounds])
    bound_ms = _step_bytes(result, case) / bytes_per_s * 1e3
    return bound_ms / median_of_rounds(_samples(case, "token_ms"))


def _step_bytes(result: Mapping[str, Any], case: Mapping[str, Any]) -> int:
    cfg = result["config"]
    depth = result["prompt_tokens"] + case["steps"] // 2
    kv_dim = cfg["dim"] // cfg["num_heads"] * cfg["num_kv_heads"]
    value_bytes = 1 if case["artifact"].endswith(KV8) else 4
    return (
        result["read_bytes"][_decode_artifact(case["artifact"])] + 2 * cfg["num_layers"] * kv_dim * depth * value_bytes
    )


def _decode_artifact(artifact: str) -> str:
    return artifact.removesuffix(KV8).rpartition("+")[2]


def _render_check(result: Mapping[str, Any]) -> list[str]:
    reference = result["reference"]
    parts = []
    for name, check in result["check"].items():
        if check.get("missing"):
            parts.append(f"{name} not run")
        elif check["wrong_at"] is None:
            parts.append(f"{name} equal ({check['compared']})")
        else:
            parts.append(f"{name} differs at {check['wrong_at']}")
    tokens = reference["tokens"]
    return [
        f"Greedy tokens of the float32 artifacts against torch's {len(tokens)} ({len(set(tokens))} distinct, smallest "
        f"margin {min(reference['margins']):.2g}, tolerance {reference['tolerance']:.2g}): {'; '.join(parts)}.",
        "",
    ]
