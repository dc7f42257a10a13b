"""The bundle is the smallest or fastest artifact that passes everything, and the sentence says why."""

from __future__ import annotations

import dataclasses

from ryot.report.targets import build_target, load_target

from .synthetic import ARTIFACTS, make_artifacts, make_report, make_results


def target(prefer="smallest", name="t", **limits):
    return build_target(name, {"prefer": prefer, "limits": limits}, name)


def test_the_smallest_passing_artifact_is_chosen_by_default():
    report = make_report()
    assert (report.choice.variant, report.choice.precision, report.choice.exit_code) == ("optimized", "int8-dyn", 0)
    assert report.choice.reason == (
        "optimized int8-dyn is the smallest of the 4 artifacts that pass every limit of phase1 (1.47 MB,"
        f" {report.rows[3].decode_tok_s:.0f} tok/s)."
    )
    assert [r.chosen for r in report.rows] == [False, False, False, True]


def test_a_breached_gate_takes_an_artifact_out_however_small():
    artifacts = make_artifacts()
    artifacts[3] = dataclasses.replace(artifacts[3], passed=False, reason="bpb ratio 1.04 over 1.01")
    report = make_report(artifacts=artifacts)
    assert (report.choice.variant, report.choice.precision) == ("baseline", "int8-dyn")
    assert any("optimized int8-dyn is no candidate: bpb ratio 1.04" in n for n in report.notes)
    assert not report.rows[3].pareto


def test_the_fastest_is_chosen_when_the_target_prefers_it():
    artifacts = {**ARTIFACTS, ("optimized", "int8"): (1.9, 2.0, 9500, 54.0, 1.001, 0.001, 0.99)}
    report = make_report(
        artifacts=make_artifacts(artifacts),
        results=make_results(artifacts=artifacts),
        targets=[target("fastest", ttft_ms=120)],
    )
    assert report.choice.precision == "int8"
    assert "is the fastest of the 5 artifacts" in report.choice.reason


def test_among_artifacts_of_one_speed_the_fastest_preference_takes_the_smallest():
    artifacts = {**ARTIFACTS, ("optimized", "int8"): (1.9, 2.1, 8302, 54.0, 1.001, 0.001, 0.99)}
    report = make_report(
        artifacts=make_artifacts(artifacts),
        results=make_results(artifacts=artifacts),
        targets=[target("fastest", ttft_ms=120)],
    )
    assert report.choice.precision == "int8-dyn"


def test_without_a_passing_artifact_the_nearest_is_named_with_what_it_misses():
    report = make_report(targets=[target(ttft_ms=1.9, decode_tok_s=25)])
    choice = report.choice
    assert (choice.variant, choice.precision, choice.exit_code) == ("optimized", "int8-dyn", 3)
    assert choice.reason.startswith("No artifact passes every limit of t; optimized int8-dyn is the nearest and misses")
    assert "> 1.9 ms (t)" in choice.missed[0]
    assert not any(r.chosen for r in report.rows)


def test_a_limit_inside_the_interval_is_not_called_missed():
    report = make_report(targets=[target(ttft_ms=make_report().rows[3].ttft_ms)])
    assert report.choice.exit_code == 3
    assert "cannot be told to meet" in report.choice.reason


def test_several_targets_must_all_be_met():
    report = make_report(targets=[load_target("phase1"), target(name="tight", size_mb=1.0)])
    assert report.choice.exit_code == 3
    assert report.choice.missed == ("size 1.47 > 1 MB (tight)",)


def test_no_artifact_left_by_the_gates_is_exit_code_4():
    report = make_report(artifacts=make_artifacts(passed=False, reason="logits differ"))
    assert report.choice.exit_code == 4
    assert "baseline fp32: logits differ" in report.choice.reason


def test_the_pareto_front_drops_what_another_artifact_beats_everywhere():
    report = make_report()
    # baseline fp32 has the bits per byte of optimized fp32 and is larger and slower.
    assert [r.pareto for r in report.rows] == [False, True, True, True]
