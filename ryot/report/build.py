"""From measure results and trainings to a report: figures, intervals, ratios, verdicts, choice."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import ryot
from ryot.artifact import ArtifactId
from ryot.edge.noise import find_noise
from ryot.edge.protocol import MeasureResult
from ryot.mapping import to_mapping
from ryot.report.choice import choose_artifact, mark_pareto
from ryot.report.comparisons import (
    BASELINE_VARIANT,
    compare_rows,
    compare_variants,
    describe_lengths,
    describe_losses,
    find_baseline,
)
from ryot.report.reinforcement import describe_passes
from ryot.report.rows import AblationRow, ArtifactRow, ExportedArtifact, Report, StageTime, VariantRow
from ryot.report.samples import TIMED, peak_bytes, samples_of, token_latencies
from ryot.report.stats import describe_spread, median_of_rounds, percentiles, value_interval
from ryot.report.targets import Target
from ryot.report.verdicts import death_reason, judge_artifact, place_note, verdict_words


def build_report(
    *,
    run_id: str,
    command: str,
    artifacts: Sequence[ExportedArtifact],
    results: Mapping[ArtifactId, Sequence[MeasureResult]],
    targets: Sequence[Target],
    machine: Mapping[str, object],
    corpus: Mapping[str, object],
    variants: Sequence[VariantRow] = (),
    preset: str = "",
    plan: Mapping[str, object] | None = None,
    quick: bool = False,
    stages: Sequence[StageTime] = (),
    bundle: str | None = None,
    created_at: str | None = None,
) -> Report:
    """The report of a run.

    An artifact without results (a gate stopped it) gets a row without figures. `variants` may lack an artifact's
    training, as when only a bundle is measured. `bundle` is where the chosen artifact, if there is one, will be.
    """
    rows = [build_row(artifact, results.get(artifact.id, ())) for artifact in artifacts]
    verdicts = []
    for k, row in enumerate(rows):
        per_target = {t.name: judge_artifact(row, t, machine) for t in targets}
        rows[k] = dataclasses.replace(row, verdicts={name: verdict_words(v) for name, v in per_target.items()})
        verdicts += [v for found in per_target.values() for v in found]
    choice = choose_artifact(rows, verdicts, targets)
    chosen = choice.id if choice.exit_code == 0 else None
    rows = [
        dataclasses.replace(row, pareto=pareto, chosen=row.id == chosen) for row, pareto in zip(rows, mark_pareto(rows))
    ]
    baseline = find_baseline(rows)
    report = Report(
        run_id=run_id,
        command=command,
        created_at=created_at or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ryot_version=ryot.__version__,
        preset=preset,
        quick=quick,
        baseline=str(baseline.id) if baseline else "",
        machine=machine,
        corpus=corpus,
        plan=plan or {},
        stages=tuple(stages),
        targets=tuple(to_mapping(t) for t in targets),
        variants=tuple(_with_time_to_baseline(variants)),
        rows=tuple(rows),
        comparisons=tuple(compare_variants(variants) + (compare_rows(rows, baseline) if baseline else [])),
        verdicts=tuple(verdicts),
        choice=choice,
        ablation=tuple(build_ablation(variants)),
        bundle=bundle if chosen else None,
    )
    return dataclasses.replace(report, notes=tuple(_warnings(report, results, targets)))


def build_row(artifact: ExportedArtifact, results: Sequence[MeasureResult]) -> ArtifactRow:
    """An artifact's row: medians over rounds with intervals, percentiles, and what the spread comes from."""
    ordered = sorted(results, key=lambda r: (r.batch_size, r.round))
    single = tuple(r for r in ordered if r.batch_size == 1)
    row = ArtifactRow(
        **{f.name: getattr(artifact, f.name) for f in dataclasses.fields(ExportedArtifact)},
        runs=len(single),
        runs_ok=sum(r.ok for r in single),
        samples=single,
        batch_samples=tuple(r for r in ordered if r.batch_size != 1),
    )
    figures: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for metric in TIMED:
        rounds = samples_of(row, metric)
        interval = value_interval(rounds)
        if interval is not None:
            figures[metric] = median_of_rounds(rounds)
            intervals[metric] = (interval.low, interval.high)
    peaks = [peak_bytes(r) for r in row.samples if r.ok and peak_bytes(r)]
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


def _batch_rates(results: Sequence[MeasureResult]) -> dict[str, float]:
    rates: dict[str, list[list[float]]] = {}
    for result in results:
        if result.ok and result.decode_tok_s:
            rates.setdefault(str(result.batch_size), []).append(result.decode_tok_s)
    return {size: median_of_rounds(rounds) for size, rounds in rates.items()}


def build_ablation(variants: Sequence[VariantRow]) -> list[AblationRow]:
    """Bars of an ablation, from variants named `baseline+WHAT`; empty when there are none."""
    names = dict.fromkeys(v.name for v in variants)
    if not any(n.startswith(f"{BASELINE_VARIANT}+") for n in names):
        return []
    rows = []
    for name in names:
        trained = [v for v in variants if v.name == name and v.train_wall_s and v.val_loss and not v.failed]
        if trained:
            rows.append(
                AblationRow(
                    name=name,
                    train_wall_s=tuple(float(v.train_wall_s or 0) for v in trained),
                    val_loss=tuple(float(v.val_loss or 0) for v in trained),
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


def _warnings(
    report: Report, results: Mapping[ArtifactId, Sequence[MeasureResult]], targets: Sequence[Target]
) -> list[str]:
    notes = []
    if report.quick:
        notes.append("Quick run with a small budget: not comparable with other reports.")
    notes += [f"{v.name} (seed {v.seed}) stopped: {v.failed}" for v in report.variants if v.failed]
    notes += describe_losses(report.variants)
    notes += describe_passes(report)
    if report.baseline_row is not None:
        notes += describe_lengths(report.rows, report.baseline_row)
    notes += [
        f"{row.variant} {row.precision}: {row.reason}" for row in report.rows if row.reason and row.runs_ok < row.runs
    ]
    notes += [
        f"{row.variant} {row.precision} is no candidate: {row.reason or 'a gate failed'}"
        for row in report.rows
        if not row.passed
    ]
    noise = find_noise([r for found in results.values() for r in found])
    if noise:
        notes.append("Noisy machine: " + "; ".join(noise) + ".")
    notes += [f"{t.name}: {place_note(t, report.machine)}" for t in targets if t.device is not None]
    return notes
