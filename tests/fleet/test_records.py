"""Rows of devices: each judged by its own figures, under its own name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema

from ryot.artifact import ArtifactId
from ryot.edge.bundle import load_bundle
from ryot.edge.protocol import MeasureResult
from ryot.fleet.records import join_reports, judge_device
from ryot.report.compare import compare_reports
from ryot.report.render import render
from ryot.report.rows import load_report, load_schema, report_to_dict, save_report
from ryot.report.targets import build_target


def test_devices_are_rows_of_one_report_each_with_its_own_verdicts(version_1: Path, tmp_path: Path) -> None:
    bundle = load_bundle(version_1)
    target = build_target("fast", {"limits": {"ttft_ms": 100}}, "fast")
    reports = []
    for device, ttft_ms in (("kitchen", 3.0), ("hall", 500.0)):
        results = [
            MeasureResult(ok=True, round=n, ttft_ms=[ttft_ms] * 5, decode_tok_s=[100.0] * 5, runs=5, prompt_tokens=64)
            for n in range(3)
        ]
        machine = {"cpu": {"model": f"CPU of {device}"}}
        reports.append(judge_device(bundle, device, results, [target], machine, "a test"))
    report = join_reports(reports)
    assert {row.device: row.verdicts["fast"]["ttft"] for row in report.rows} == {"kitchen": "PASS", "hall": "FAIL"}
    assert [(v.device, v.verdict) for v in report.verdicts] == [("kitchen", "PASS"), ("hall", "FAIL")]
    assert (report.comparisons, report.choice, report.baseline) == ((), None, "")
    jsonschema.validate(json.loads(json.dumps(report_to_dict(report))), load_schema())
    save_report(report, tmp_path / "report.json")
    assert load_report(tmp_path / "report.json") == report
    # A device is compared with itself where it is in both, and any with what was measured here.
    assert {line.subject for line in compare_reports(report, reports[1]).lines} == {"tiny/fp32@hall"}
    shown = render(report)
    assert re.search(r"^kitchen +tiny .* PASS$", shown, re.M) and re.search(r"^hall +tiny .* FAIL$", shown, re.M)


def test_an_artifact_of_a_device_has_a_name_of_its_own() -> None:
    there = ArtifactId("optimized", 0, "int8-dyn+int4", "pi@kitchen")
    assert str(there) == "optimized/seed-0/int8-dyn+int4@pi@kitchen"
    assert ArtifactId.parse(str(there)) == there
    assert ArtifactId.parse("optimized/seed-0/int4") == ArtifactId("optimized", 0, "int4")
