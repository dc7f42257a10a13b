"""Ratios of artifacts and of trainings to the baseline's, each with the interval that its samples carry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ryot.report.rows import ArtifactRow, Comparison, VariantRow
from ryot.report.samples import paired_ratio
from ryot.report.stats import Interval, call_difference, compare_means, unpaired_ratio_interval

#: What everything is compared with, where it is there.
BASELINE_VARIANT, BASELINE_PRECISION = "baseline", "fp32"


def find_baseline(rows: Sequence[ArtifactRow]) -> ArtifactRow | None:
    """The artifact that ratios are against: the baseline in fp32, else the first one in fp32, else the first."""
    for wanted in (
        lambda r: (r.variant, r.precision) == (BASELINE_VARIANT, BASELINE_PRECISION),
        lambda r: r.variant == BASELINE_VARIANT,
        lambda r: r.precision == BASELINE_PRECISION,
        lambda r: True,
    ):
        for row in rows:
            if wanted(row):
                return row
    return None


def timed_against(row: ArtifactRow, rows: Sequence[ArtifactRow], baseline: ArtifactRow) -> ArtifactRow | None:
    """What an artifact's timings are held against: the baseline, or its own fp32 where that read another prompt.

    A prompt of 128 tokens and one of 32 are no measure of each other. None where there is nothing of equal length.
    """
    own = (r for r in rows if (r.variant, r.seed, r.precision) == (row.variant, row.seed, BASELINE_PRECISION))
    return next((r for r in (baseline, *own) if _prompt_tokens(r) == _prompt_tokens(row)), None)


def _prompt_tokens(row: ArtifactRow) -> set[int]:
    return {result.prompt_tokens for result in row.samples if result.ok}


def describe_lengths(rows: Sequence[ArtifactRow], baseline: ArtifactRow) -> list[str]:
    """For each variant whose timings are not held against the baseline, why and against what, as a sentence."""
    lines = []
    for variant in dict.fromkeys(r.variant for r in rows if r.runs_ok):
        row = next(r for r in rows if r.variant == variant and r.runs_ok)
        other = timed_against(row, rows, baseline)
        if baseline.runs_ok and (other is None or other.id != baseline.id):
            lengths = [", ".join(map(str, sorted(_prompt_tokens(r)))) for r in (row, baseline)]
            than = f"to {other.variant} {other.precision}" if other else "to none"
            lines.append(
                f"{variant} is measured with prompts of {lengths[0]} tokens, {baseline.variant} with {lengths[1]}: "
                f"its ratios of time are {than}."
            )
    return lines


def compare_rows(rows: Sequence[ArtifactRow], baseline: ArtifactRow) -> list[Comparison]:
    """Each artifact against the baseline: timed figures paired by round and as `timed_against` says, exact ones as
    they are."""
    found = []
    for row in rows:
        if row.id == baseline.id:
            continue
        timed = timed_against(row, rows, baseline)
        for metric in ("ttft_ms", "decode_tok_s", "e2e_ttft_ms", "load_ms", "peak_rss_bytes"):
            other = timed if metric in ("ttft_ms", "decode_tok_s", "e2e_ttft_ms") else baseline
            if other is None or other.id == row.id:
                continue
            interval = paired_ratio(row, other, metric)
            if interval is not None:
                found.append(comparison(metric, str(row.id), str(other.id), interval))
        for metric, a, b in (
            ("size_bytes", float(row.size_bytes), float(baseline.size_bytes)),
            ("bpb", row.quality.get("bpb"), baseline.quality.get("bpb")),
        ):
            if a and b:
                found.append(exact_comparison(metric, str(row.id), str(baseline.id), a / b))
    return found


def compare_variants(variants: Sequence[VariantRow]) -> list[Comparison]:
    """Each variant's training against the baseline's; an interval where there are several seeds of both."""
    base = [v for v in variants if v.name == BASELINE_VARIANT and not v.failed]
    found = []
    for name in dict.fromkeys(v.name for v in variants if v.name != BASELINE_VARIANT):
        side_a = [v for v in variants if v.name == name and not v.failed]
        for metric in ("params", "train_wall_s", "tokens_per_s", "test_bpb", "val_bpb"):
            a, b = ([[float(x)] for v in side if (x := getattr(v, metric))] for side in (side_a, base))
            if not a or not b:
                continue
            note = (
                "concurrent" if metric in ("train_wall_s", "tokens_per_s") and any(v.concurrent for v in side_a) else ""
            )
            if metric == "params":
                found.append(exact_comparison(metric, name, BASELINE_VARIANT, a[0][0] / b[0][0]))
            elif len(a) > 1 and len(b) > 1 and (interval := unpaired_ratio_interval(a, b)) is not None:
                found.append(comparison(metric, name, BASELINE_VARIANT, interval, note))
            else:
                ratio = float(np.median(a) / np.median(b))
                found.append(
                    Comparison(
                        metric=metric, a=name, b=BASELINE_VARIANT, ratio=ratio, low=None, high=None,
                        verdict="single values", note=note,
                    )
                )  # fmt: skip
    return found


def describe_losses(variants: Sequence[VariantRow]) -> list[str]:
    """For each variant with several seeds, whether its final loss equals the baseline's, as a sentence."""

    def losses(name: str) -> list[float]:
        return [v.test_loss for v in variants if v.name == name and not v.failed and v.test_loss is not None]

    base, lines = losses(BASELINE_VARIANT), []
    for name in dict.fromkeys(v.name for v in variants if v.name != BASELINE_VARIANT):
        if len(own := losses(name)) > 1 and len(base) > 1:
            found = compare_means(own, base)
            lines.append(
                f"Final test loss of {name} minus {BASELINE_VARIANT}'s, over {len(own)} seeds: {found.difference:+.3f}"
                f" [{found.low:+.3f}, {found.high:+.3f}] nats (90 %): {found.verdict} at a margin of {found.margin:g}."
            )
    return lines


def comparison(metric: str, a: str, b: str, interval: Interval, note: str = "") -> Comparison:
    """A comparison from a ratio's interval."""
    return Comparison(
        metric=metric, a=a, b=b, ratio=interval.value, low=interval.low, high=interval.high,
        verdict=call_difference(interval),
        note=note or ("one round: interval from an assumed spread" if interval.rounds == 1 else ""),
    )  # fmt: skip


def exact_comparison(metric: str, a: str, b: str, ratio: float) -> Comparison:
    """A comparison of two figures that have no spread."""
    return comparison(metric, a, b, Interval(ratio, ratio, ratio, 2))
