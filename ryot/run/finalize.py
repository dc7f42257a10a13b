"""The last stage of a run: its report, its bundle and its exit code, from what the stages before returned."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from ryot.atomic import write_atomically
from ryot.config import PRECISIONS, to_mapping
from ryot.deploy.bundle import finish_bundle
from ryot.errors import EXIT_FAILED, EXIT_QUALITY, worst_exit_code
from ryot.events import read_events
from ryot.report.build import build_report
from ryot.report.curves import curves_from_events
from ryot.report.html import render_html
from ryot.report.markdown import render_markdown
from ryot.report.reinforcement import reinforcement_from_events
from ryot.report.rows import ExportedArtifact, Report, VariantRow, build_record, report_to_dict, save_report
from ryot.run.context import RunContext
from ryot.run.executor import Measured
from ryot.run.folder import RunFolder
from ryot.run.imports import ImportResult
from ryot.run.inputs import RunInputs
from ryot.run.metrics import TrainMetrics
from ryot.run.plan import RunPlan
from ryot.run.training import TrainResult


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResults:
    """What the stages of a run gave."""

    plan: RunPlan
    inputs: RunInputs
    trainings: Sequence[TrainResult]
    imports: Sequence[ImportResult]
    artifacts: Sequence[ExportedArtifact]
    measured: Measured


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    report: Report
    exit_code: int


def finalize(context: RunContext, results: StageResults) -> Outcome:
    """Judge, write report and bundle in place of those of an earlier try, and say how the run ended."""
    with context.stage("report"):
        report = build_run_report(context, results)
        _write(context.folder, report)
    return Outcome(report, decide_exit_code(report, results))


def build_run_report(context: RunContext, results: StageResults) -> Report:
    """The report of a run; it names the bundle if an artifact was chosen."""
    plan, folder = results.plan, context.folder
    names = plan.names
    return build_report(
        run_id=folder.path.name,
        command=context.settings.command,
        artifacts=sorted(
            results.artifacts, key=lambda a: (names.index(a.variant), a.seed, PRECISIONS.index(a.precision))
        ),
        results=results.measured.results,
        targets=plan.targets,
        machine=results.measured.machine,
        corpus=results.inputs.corpus_facts(),
        variants=[*_trained_rows(folder, results), *map(_imported_row, results.imports)],
        preset=plan.options.preset if plan.variants else "",
        plan=to_mapping(plan),
        quick=plan.options.quick,
        stages=context.stage_times,
        bundle=folder.relative(folder.bundle),
    )


def decide_exit_code(report: Report, results: StageResults) -> int:
    """The exit code of a run, by `ryot/errors.py`."""
    assert report.choice is not None
    codes = [report.choice.exit_code]
    if any(t.error for t in results.trainings) or any(i.error for i in results.imports):
        codes.append(EXIT_FAILED)
    if results.plan.options.precisions and any(not a.passed for a in results.artifacts):
        codes.append(EXIT_QUALITY)  # one asked for by name
    return worst_exit_code(codes)


def _write(folder: RunFolder, report: Report) -> None:
    """Bundle and reports; what was there is replaced when what replaces it is whole."""
    chosen = next((row for row in report.rows if row.chosen), None)
    if chosen is not None:
        finish_bundle(folder.path / chosen.path, folder.bundle, report_to_dict(build_record(report, chosen)))
    write_atomically(folder.markdown, render_markdown(report))
    write_atomically(folder.html, render_html(report))
    save_report(report, folder.report)
    if chosen is None:
        shutil.rmtree(folder.bundle, ignore_errors=True)  # of an earlier try; no report names it any more


def _trained_rows(folder: RunFolder, results: StageResults) -> list[VariantRow]:
    curves = curves_from_events(read_events(folder.events))
    reinforcements = reinforcement_from_events(read_events(folder.events))
    rows = []
    for result in results.trainings:
        variant, metrics = results.plan.variant(result.variant), result.metrics
        wall_s = metrics.train_wall_s
        curve, train_curve = curves.get((result.variant, result.seed), ((), ()))
        rows.append(
            VariantRow(
                name=result.variant,
                seed=result.seed,
                params=variant.model.num_parameters,
                tokens_per_s=metrics.tokens / wall_s if wall_s else None,
                concurrent=len(results.trainings) > 1,
                failed=str(result.error or ""),
                summary=variant.summary,
                curve=curve,
                train_curve=train_curve,
                reinforcement=reinforcements.get((result.variant, result.seed), {}),
                **{f.name: getattr(metrics, f.name) for f in dataclasses.fields(TrainMetrics)},
            )
        )
    return rows


def _imported_row(result: ImportResult) -> VariantRow:
    """The row of a model that was not trained here."""
    model = result.model
    return VariantRow(
        name=model.config.name,
        seed=0,
        params=model.spec.num_parameters,
        tokens=None,
        failed=str(result.error or ""),
        source=model.source,
        source_sha256=model.sha256,
    )
