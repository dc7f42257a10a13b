"""A second measurement agrees with a first one, or the difference is named."""

from __future__ import annotations

import dataclasses
import json

from ryot.artifact import ArtifactId
from ryot.report.reproduce import check_reproduced, render_reproduction

from .synthetic import change_results, make_artifacts, make_report, make_results
from .test_compare import LATER


def test_a_second_measurement_of_the_same_reproduces_the_first():
    found = check_reproduced(make_report(), make_report(results=make_results(seed=5), **LATER))
    assert found.agrees and not found.differences


def test_a_slower_second_measurement_does_not_reproduce():
    found = check_reproduced(make_report(), make_report(results=make_results(seed=5, slowdown=1.2), **LATER))
    assert not found.agrees
    assert any("TTFT (ms)" in d and "allowed within 5.0%" in d for d in found.differences)


def test_timings_of_another_machine_do_not_count_but_size_does():
    other = {"machine": {"cpu": {"model": "Other", "cores": 8}}, **LATER}
    found = check_reproduced(make_report(), make_report(results=make_results(seed=5, slowdown=1.5), **other))
    assert found.agrees and "Another machine" in found.notes[0]
    artifacts = make_artifacts()
    larger = [dataclasses.replace(f, size_bytes=f.size_bytes + 1000) for f in artifacts]
    assert not check_reproduced(make_report(), make_report(artifacts=larger, **other)).agrees


def test_a_missing_artifact_and_a_changed_verdict_are_differences():
    missing = check_reproduced(make_report(), make_report(artifacts=make_artifacts()[:3], **LATER))
    assert missing.differences == ("optimized/int8-dyn: measured then, missing now",)
    results = change_results(make_results(), ArtifactId("optimized", 0, "int8-dyn"), ok=False, reason="killed")
    changed = check_reproduced(make_report(), make_report(results=results, **LATER))
    assert "optimized/int8-dyn: phase1 ttft was PASS, is FAIL" in changed.differences


def test_a_artifact_that_failed_its_quality_gate_is_measured_again_too_and_quality_is_not():
    artifacts = [dataclasses.replace(f, passed=f.precision != "int8-dyn", reason="too bad") for f in make_artifacts()]
    other = [dataclasses.replace(f, quality={**f.quality, "bpb": 9.9}) for f in artifacts]
    found = check_reproduced(
        make_report(artifacts=artifacts), make_report(artifacts=other, results=make_results(seed=5), **LATER)
    )
    assert found.agrees, found.differences
    assert not [line for line in found.lines if line.metric == "bits per byte"]
    assert found.notes[-1].startswith("Quality is not measured again")


def test_the_closing_line_says_whether_the_figures_agree():
    good = check_reproduced(make_report(), make_report(results=make_results(seed=5), **LATER))
    bad = check_reproduced(make_report(), make_report(results=make_results(slowdown=1.2), **LATER))
    assert render_reproduction(good).endswith("The figures agree.")
    text = render_reproduction(bad)
    assert "The figures do not agree:\n- baseline/fp32: TTFT (ms)" in text
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads(render_reproduction(bad, "json"))["agrees"] is False
