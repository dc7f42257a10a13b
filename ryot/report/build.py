"""From measure results and training facts to a report: figures, intervals, ratios, verdicts, choice."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import ryot
from ryot.edge.noise import find_noise
from ryot.edge.protocol import MeasureResult
from ryot.events import EvalEvent, Event, StepEvent
from ryot.report.choice import choose_form, mark_pareto
from ryot.report.rows import AblationRow, Comparison, Curve, FormRow, Report, VariantRow, arm_name
from ryot.report.samples import TIMED, paired_ratio, samples_of, token_latencies
from ryot.report.stats import (
    Interval,
    call_difference,
    compare_means,
    describe_spread,
    median_of_rounds,
    percentiles,
    unpaired_ratio_interval,
    value_interval,
)
from ryot.report.targets import Target, target_to_mapping
from ryot.report.verdicts import death_reason, judge_form, place_note, verdict_words

#: Points kept of a training curve.
CURVE_POINTS = 200
#: The plain arms that everything is compared with.
BASELINE_VARIANT, BASELINE_PRECISION = "baseline", "fp32"


@dataclass(frozen=True, kw_only=True, slots=True)
class FormFacts:
    """What is known of a form before it is measured."""

    variant: str
    seed: int
    precision: str
    size_bytes: int
    context_tokens: int | None = None
    quality: Mapping[str, float | None] = field(default_factory=dict)
    """kl, top1, bpb, bpb_ratio."""
    passed: bool = True
    reason: str = ""
    path: str = ""


def build_report(
    *,
    run_id: str,
    command: str,
    forms: Sequence[FormFacts],
    results: Sequence[Any],
    targets: Sequence[Target],
    machine: Mapping[str, Any],
    corpus: Mapping[str, Any],
    variants: Sequence[VariantRow] = (),
    preset: str = "",
    plan: Mapping[str, Any] | None = None,
    quick: bool = False,
    stages: Sequence[Mapping[str, Any]] = (),
    bundle: str | None = None,
    notes: Sequence[str] = (),
    created_at: str | None = None,
) -> Report:
    """The report of a run.

    `results` are measure results (dataclasses or mappings) whose `arm` is `rows.arm_name` of a form, with the batch
    size where it is not 1. Forms that were
    not measured (a gate stopped them) get a row without figures. `variants` may lack a form's training, as when only
    a bundle is measured.
    """
    plain = [dataclasses.asdict(r) if dataclasses.is_dataclass(r) and not isinstance(r, type) else r for r in results]
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for result in plain:
        by_arm.setdefault(str(result["arm"]), []).append(result)
    rows = [
        build_row(
            facts,
            by_arm.get(arm := arm_name(facts.variant, facts.seed, facts.precision), []),
            [r for name, found in by_arm.items() if name.startswith(f"{arm}/batch-") for r in found],
        )
        for facts in forms
    ]
    verdicts = []
    for k, row in enumerate(rows):
        per_target = {t.name: judge_form(row, t, machine) for t in targets}
        rows[k] = dataclasses.replace(row, verdicts={name: verdict_words(v) for name, v in per_target.items()})
        verdicts += [v for found in per_target.values() for v in found]
    choice = choose_form(rows, verdicts, targets)
    chosen = (choice.variant, choice.seed, choice.precision) if choice.exit_code == 0 else None
    rows = [
        dataclasses.replace(row, pareto=pareto, chosen=(row.variant, row.seed, row.precision) == chosen)
        for row, pareto in zip(rows, mark_pareto(rows))
    ]
    baseline = find_baseline(rows)
    report = Report(
        run_id=run_id,
        command=command,
        created_at=created_at or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ryot_version=ryot.__version__,
        preset=preset,
        quick=quick,
        baseline=baseline.arm if baseline else "",
        machine=machine,
        corpus=corpus,
        plan=plan or {},
        stages=tuple(stages),
        targets=tuple(target_to_mapping(t) for t in targets),
        variants=tuple(_with_time_to_baseline(variants)),
        rows=tuple(rows),
        comparisons=tuple(compare_variants(variants) + (compare_rows(rows, baseline) if baseline else [])),
        verdicts=tuple(verdicts),
        choice=choice,
        ablation=tuple(build_ablation(variants)),
        bundle=bundle,
    )
    return dataclasses.replace(report, notes=(*notes, *_warnings(report, plain, targets)))


def build_row(
    facts: FormFacts, results: Sequence[Mapping[str, Any]], batch_results: Sequence[Mapping[str, Any]] = ()
) -> FormRow:
    """A form's row: medians over rounds with intervals, percentiles, and what the spread comes from."""
    row = FormRow(
        **{f.name: getattr(facts, f.name) for f in dataclasses.fields(facts)},
        runs=len(results),
        runs_ok=sum(bool(r.get("ok")) for r in results),
        samples=_in_order(results),
        batch_samples=_in_order(batch_results),
    )
    figures: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for metric in TIMED:
        rounds = samples_of(row, metric)
        interval = value_interval(rounds)
        if interval is not None:
            figures[metric] = median_of_rounds(rounds)
            intervals[metric] = (interval.low, interval.high)
    peaks = [int(peak_bytes(r)) for r in row.samples if r.get("ok") and peak_bytes(r)]
    if peaks:
        # The worst process has to fit, so the peak is a maximum and its interval the range that was seen.
        figures["peak_rss_bytes"] = max(peaks)
        intervals["peak_rss_bytes"] = (min(peaks), max(peaks))
    carried = {"ttft_ms": [v for r in samples_of(row, "ttft_ms") for v in r], "token_ms": token_latencies(row)}
    return dataclasses.replace(
        row,
        **figures,
        intervals=intervals,
        batch_tok_s=_batch_rates(row.batch_samples),
        percentiles={name: percentiles(values) for name, values in carried.items() if values},
        spread={m: s for m in ("ttft_ms", "decode_tok_s") if (s := describe_spread(samples_of(row, m)))},
        reason=row.reason or (death_reason(row) if row.runs > row.runs_ok else ""),
    )


def _in_order(results: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    return tuple(sorted(results, key=lambda r: (int(r.get("batch_size") or 1), int(r.get("round") or 0))))


def _batch_rates(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    rates: dict[str, list[list[float]]] = {}
    for result in results:
        if result.get("ok") and result.get("decode_tok_s"):
            rates.setdefault(str(result.get("batch_size") or 1), []).append(list(result["decode_tok_s"]))
    return {size: median_of_rounds(rounds) for size, rounds in rates.items()}


def peak_bytes(result: Mapping[str, Any]) -> int:
    """The larger of the peak that the process saw of itself and the one seen from outside; 0 for neither."""
    return max(int(result.get("peak_rss_bytes") or 0), int(result.get("peak_rss_outside_bytes") or 0))


def find_baseline(rows: Sequence[FormRow]) -> FormRow | None:
    """The form that ratios are against: the baseline in fp32, else the first one in fp32, else the first."""
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


def compare_rows(rows: Iterable[FormRow], baseline: FormRow) -> list[Comparison]:
    """Each form against the baseline: timed figures paired by round, exact ones as they are."""
    found = []
    for row in rows:
        if row.arm == baseline.arm:
            continue
        for metric in ("ttft_ms", "decode_tok_s", "e2e_ttft_ms", "load_ms", "peak_rss_bytes"):
            interval = paired_ratio(row, baseline, metric)
            if interval is not None:
                found.append(comparison(metric, row.arm, baseline.arm, interval))
        for metric, a, b in (
            ("size_bytes", float(row.size_bytes), float(baseline.size_bytes)),
            ("bpb", row.quality.get("bpb"), baseline.quality.get("bpb")),
        ):
            if a and b:
                found.append(exact_comparison(metric, row.arm, baseline.arm, a / b))
    return found


def compare_variants(variants: Sequence[VariantRow]) -> list[Comparison]:
    """Each variant's training against the baseline's; an interval where there are several seeds of both."""
    base = [v for v in variants if v.name == BASELINE_VARIANT and not v.failed]
    found = []
    for name in dict.fromkeys(v.name for v in variants if v.name != BASELINE_VARIANT):
        arm = [v for v in variants if v.name == name and not v.failed]
        for metric in ("params", "train_wall_s", "tokens_per_s", "test_bpb", "val_bpb"):
            a, b = ([[float(x)] for v in side if (x := getattr(v, metric))] for side in (arm, base))
            if not a or not b:
                continue
            note = "concurrent" if metric in ("train_wall_s", "tokens_per_s") and any(v.concurrent for v in arm) else ""
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
        if len(arm := losses(name)) > 1 and len(base) > 1:
            found = compare_means(arm, base)
            lines.append(
                f"Final test loss of {name} minus {BASELINE_VARIANT}'s, over {len(arm)} seeds: {found.difference:+.3f}"
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


def curves_from_events(events: Iterable[Event]) -> dict[tuple[str, int], tuple[Curve, Curve]]:
    """For each (variant, seed) the held-out and the training loss curve that the events hold.

    A training that was resumed writes some steps twice: the last word on a number of tokens counts.
    """
    held: dict[tuple[str, int], dict[int, tuple[float, float, float]]] = {}
    seen: dict[tuple[str, int], dict[int, tuple[float, float, float]]] = {}
    for event in events:
        if isinstance(event, EvalEvent) and event.split == "val":
            held.setdefault((event.variant, event.seed), {})[event.tokens] = (
                float(event.tokens), event.train_wall_s, event.loss
            )  # fmt: skip
        elif isinstance(event, StepEvent):
            seen.setdefault((event.variant, event.seed), {})[event.tokens] = (
                float(event.tokens), event.train_wall_s, event.loss
            )  # fmt: skip
    return {key: (_thin(held.get(key, {})), _thin(seen.get(key, {}))) for key in {**held, **seen}}


def _thin(points: Mapping[int, tuple[float, float, float]]) -> Curve:
    ordered = [points[tokens] for tokens in sorted(points)]
    if len(ordered) <= CURVE_POINTS:
        return tuple(ordered)
    index = np.linspace(0, len(ordered) - 1, CURVE_POINTS).round().astype(int)
    return tuple(ordered[i] for i in index)


def build_ablation(variants: Sequence[VariantRow]) -> list[AblationRow]:
    """Bars of an ablation, from variants named `baseline+WHAT`; empty when there are none."""
    names = dict.fromkeys(v.name for v in variants)
    if not any(n.startswith(f"{BASELINE_VARIANT}+") for n in names):
        return []
    rows = []
    for name in names:
        arm = [v for v in variants if v.name == name and v.train_wall_s and v.val_loss and not v.failed]
        if arm:
            rows.append(
                AblationRow(
                    name=name,
                    train_wall_s=tuple(float(v.train_wall_s or 0) for v in arm),
                    val_loss=tuple(float(v.val_loss or 0) for v in arm),
                )
            )
    return rows


def _with_time_to_baseline(variants: Sequence[VariantRow]) -> list[VariantRow]:
    """Fill `time_to_baseline_loss_s`: the time of a whole training that ended at or below the baseline's mean loss."""
    losses = [v.val_loss for v in variants if v.name == BASELINE_VARIANT and v.val_loss is not None and not v.failed]
    if not losses:
        return list(variants)
    limit = float(np.mean(losses))
    return [
        dataclasses.replace(v, time_to_baseline_loss_s=v.train_wall_s)
        if v.time_to_baseline_loss_s is None and not v.failed and v.val_loss is not None and v.val_loss <= limit
        else v
        for v in variants
    ]


def _warnings(report: Report, results: Sequence[Mapping[str, Any]], targets: Sequence[Target]) -> list[str]:
    notes = []
    if report.quick:
        notes.append("Quick run with a small budget: not comparable with other reports.")
    notes += [f"{v.name} (seed {v.seed}) stopped: {v.failed}" for v in report.variants if v.failed]
    notes += describe_losses(report.variants)
    notes += [
        f"{row.variant} {row.precision}: {row.reason}" for row in report.rows if row.reason and row.runs_ok < row.runs
    ]
    notes += [
        f"{row.variant} {row.precision} is no candidate: {row.reason or 'a gate failed'}"
        for row in report.rows
        if not row.passed
    ]
    noise = find_noise([MeasureResult.from_mapping(r) for r in results])
    if noise:
        notes.append("Noisy machine: " + "; ".join(noise) + ".")
    notes += [f"{t.name}: {place_note(t, report.machine)}" for t in targets if t.device is not None]
    return notes
