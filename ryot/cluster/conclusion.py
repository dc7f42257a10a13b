"""What a run comes to: its report, its bundle and its exit code, from what training, export and measurement gave."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ryot.atomic import write_atomically
from ryot.cluster.jobs import TrainResult
from ryot.config import PRECISIONS, to_mapping
from ryot.deploy.bundle import finish_bundle
from ryot.edge.bundle import TOKENIZER_NAME, hash_file
from ryot.edge.protocol import MeasureResult
from ryot.errors import EXIT_FAILED, EXIT_QUALITY, worst_exit_code
from ryot.events import read_events
from ryot.plan import RunPlan
from ryot.report.build import FormFacts, build_report, curves_from_events
from ryot.report.html import render_html
from ryot.report.markdown import render_markdown
from ryot.report.rows import Report, VariantRow, build_record, report_to_dict, save_report
from ryot.report.targets import Target
from ryot.train.dataset import Dataset

BUNDLE = "bundle"

#: Facts of a training that its row takes over as they are.
_TRAINING_FACTS = (
    "compile_s",
    "initial_val_loss",
    "val_loss",
    "val_bpb",
    "test_loss",
    "test_bpb",
    "grad_norm_max",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything that the stages of a run gave."""

    plan: RunPlan
    command: str
    dataset: Dataset
    trainings: Sequence[TrainResult]
    forms: Sequence[FormFacts]
    measured: Sequence[MeasureResult]
    machine: Mapping[str, Any]
    targets: Sequence[Target]
    stages: Sequence[Mapping[str, Any]]


def build_run_report(run_dir: Path, findings: Findings) -> Report:
    """The report of a run; it names the bundle if a form was chosen, which `write_outcome` then makes."""
    names = [v.name for v in findings.plan.variants]
    dataset = findings.dataset

    def build(bundle: str | None) -> Report:
        return build_report(
            run_id=run_dir.name,
            command=findings.command,
            forms=sorted(findings.forms, key=lambda f: (names.index(f.variant), f.seed, PRECISIONS.index(f.precision))),
            results=findings.measured,
            targets=findings.targets,
            machine=findings.machine,
            corpus={
                "name": dataset.name,
                "sha256": dataset.corpus_sha256,
                **{f"{split}_tokens": count for split, count in dataset.num_tokens.items()},
                "vocab_size": dataset.vocab_size,
                "tokenizer_sha256": hash_file(dataset.path / TOKENIZER_NAME),
            },
            variants=_variant_rows(run_dir, findings),
            preset=findings.plan.options.preset,
            plan=to_mapping(findings.plan),
            quick=findings.plan.options.quick,
            stages=findings.stages,
            bundle=bundle,
        )

    report = build(None)
    return build(BUNDLE) if any(row.chosen for row in report.rows) else report


def write_outcome(run_dir: Path, report: Report) -> None:
    """Put bundle and reports into the run folder, in place of those of an earlier try."""
    target = run_dir / BUNDLE
    shutil.rmtree(target, ignore_errors=True)
    for row in report.rows:
        if row.chosen:
            finish_bundle(run_dir / row.path, target, report_to_dict(build_record(report, row)))
    write_atomically(run_dir / "report.md", render_markdown(report))
    write_atomically(run_dir / "report.html", render_html(report))
    save_report(report, run_dir / "report.json")


def decide_exit_code(report: Report, findings: Findings) -> int:
    """The exit code of a run, by `ryot/errors.py`."""
    assert report.choice is not None
    codes = [report.choice.exit_code]
    if any(r.error for r in findings.trainings):
        codes.append(EXIT_FAILED)
    if findings.plan.options.precisions and any(not f.passed for f in findings.forms):
        codes.append(EXIT_QUALITY)  # a form asked for by name
    return worst_exit_code(codes)


def _variant_rows(run_dir: Path, findings: Findings) -> list[VariantRow]:
    curves = curves_from_events(read_events(run_dir / "events.jsonl"))
    rows = []
    for result in findings.trainings:
        variant, facts = findings.plan.variant(result.variant), result.facts
        tokens, wall_s = facts.get("tokens", 0), facts.get("train_wall_s")
        curve, train_curve = curves.get((result.variant, result.seed), ((), ()))
        rows.append(
            VariantRow(
                name=result.variant,
                seed=result.seed,
                params=variant.model.num_parameters,
                tokens=tokens,
                train_wall_s=wall_s,
                tokens_per_s=tokens / wall_s if wall_s else None,
                concurrent=len(findings.trainings) > 1,
                failed=str(result.error or ""),
                summary=variant.summary,
                curve=curve,
                train_curve=train_curve,
                **{name: facts.get(name) for name in _TRAINING_FACTS},
            )
        )
    return rows
