"""Run folders of the version before: `data/run_0_1_0` was made by it, with fewer rows and samples than it had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ryot.artifact import ArtifactId
from ryot.events import MeasureEvent, read_events
from ryot.mapping import read_mapping
from ryot.report.compare import compare_reports
from ryot.report.render import render
from ryot.report.rows import Cause, ExportedArtifact, load_report, report_from_dict, report_to_dict
from ryot.run.folder import RunFolder
from ryot.run.journal import CheckpointAccepted, StageDone, parse_journal
from ryot.run.listing import read_run
from ryot.run.measurement import load_measurements
from ryot.run.plan import load_plan

OLD = RunFolder(Path(__file__).with_name("data") / "run_0_1_0")
INT4 = ArtifactId("optimized", 0, "int4")


def test_its_state_is_read_from_its_journal(tmp_path: Path) -> None:
    state = read_run(shutil.copytree(OLD.path, tmp_path / "run"))
    assert (state.state, state.version) == ("finished", "0.1.0")
    assert [(t.key, t.state, t.step, t.attempts) for t in state.trainings] == [
        ("baseline/seed-0", "done", 12, 1),
        ("optimized/seed-0", "done", 12, 1),
    ]
    assert [round(t.val_loss or 0, 3) for t in state.trainings] == [5.857, 4.936]


def test_what_its_checkpoints_and_exports_gave_is_kept() -> None:
    records, _ = parse_journal(OLD.journal)
    lines = [json.loads(line) for line in OLD.journal.read_text().splitlines()]
    assert len(records) == len(lines)
    accepted = [r for r in records if isinstance(r, CheckpointAccepted)]
    facts = [line["facts"] for line in lines if line["record"] == "checkpoint"]
    for record, known in zip(accepted, facts, strict=True):
        for name in set(known) - {"evals"}:
            assert getattr(record.metrics, name) == known[name]
    [export, _] = [r for r in records if isinstance(r, StageDone) and r.stage == "export"]
    artifacts = [read_mapping(ExportedArtifact, old) for old in export.outputs["forms"]]
    assert {a.id.precision for a in artifacts} == {"fp32", "int8-dyn", "int8", "int4"}
    assert all(a.size_bytes > 0 and a.quality["bpb"] and "/forms/" in a.path for a in artifacts)


def test_its_plan_is_read() -> None:
    plan = load_plan(OLD.plan)
    assert plan.options.quick and [v.name for v in plan.variants] == ["baseline", "optimized"]
    assert plan.targets[0].limits["ttft_ms"] == 120


def test_its_report_is_read_rendered_and_compared() -> None:
    stored = json.loads(OLD.report.read_text())
    report = load_report(OLD.path)
    row = report.row_of(INT4)
    assert row is not None and row.chosen and report.baseline_row is not None
    assert row.samples[0].case == str(INT4) == stored["rows"][1]["samples"][0]["arm"]
    assert row.samples[0].ttft_ms == stored["rows"][1]["samples"][0]["ttft_ms"]
    assert {s.engine for s in row.samples} == {"capi"}
    assert [v.cause for v in report.verdicts] == [Cause.LIMIT] * len(stored["verdicts"])
    assert f"{row.decode_tok_s:.0f}" in render(report)
    assert {line.verdict for line in compare_reports(report, report).lines} <= {"no difference", "single values"}
    again = report_from_dict(report_to_dict(report), "again")
    assert again == report


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"note": "3 of 3 processes failed: timed out", "verdict": "FAIL"}, Cause.DIED),
        ({"note": "not measured", "value": None, "verdict": "INCONCLUSIVE"}, Cause.NOT_MEASURED),
        ({"note": "logits differ", "value": None, "verdict": "FAIL"}, Cause.GATE),
        ({"note": "measured with 2 threads, the target has 1", "verdict": "INCONCLUSIVE"}, Cause.THREADS),
        ({"note": "enforced", "verdict": "FAIL"}, Cause.LIMIT),
    ],
)
def test_a_cause_that_only_its_note_told_is_known(change: dict, cause: Cause) -> None:
    stored = json.loads(OLD.report.read_text())
    stored["verdicts"][0] |= change
    assert report_from_dict(stored, "old").verdicts[0].cause is cause


def test_its_measurements_and_events_are_read() -> None:
    measured = load_measurements(OLD.measurements)
    assert set(measured.results) == {INT4, ArtifactId("baseline", 0, "fp32")}
    assert [r.round for r in measured.results[INT4]] == [0, 1, 2]
    told = [e.case for e in read_events(OLD.events) if isinstance(e, MeasureEvent)]
    assert told and all(str(ArtifactId.parse(case)) == case for case in told)
