"""Two reports are compared only in what means the same in both."""

from __future__ import annotations

import csv
import io
import json

import pytest

from ryot.errors import ConfigError
from ryot.report.compare import all_agree, compare_reports, render_comparison
from ryot.report.rows import build_record

from .synthetic import CORPUS, MACHINE, change_results, make_report, make_results

LATER = {"created_at": "2026-01-02T00:00:00+00:00", "run_id": "later"}


def lines_of(result, metric):
    return [line for line in result.lines if line.metric == metric]


def test_two_recordings_of_the_same_artifacts_show_no_difference_in_time():
    result = compare_reports(make_report(), make_report(results=make_results(seed=5), **LATER))
    assert all_agree(lines_of(result, "TTFT (ms)") + lines_of(result, "decode (tok/s)"))
    assert any("not interleaved" in n for n in result.notes)


def test_a_slower_recording_is_found():
    slow = make_report(results=make_results(seed=5, slowdown=1.2), **LATER)
    for line in lines_of(compare_reports(slow, make_report()), "TTFT (ms)"):
        assert line.verdict == "higher"
        assert line.low < 1.2 < line.high


def test_artifacts_of_one_recording_are_paired_by_round():
    report = make_report()
    result = compare_reports(report, report, name_a="optimized/int8-dyn", name_b="baseline/fp32")
    (line,) = lines_of(result, "TTFT (ms)")
    stored = next(c for c in report.comparisons if c.metric == "ttft_ms" and c.a == str(report.rows[3].id))
    assert (line.ratio, line.low, line.high) == (stored.ratio, stored.low, stored.high)
    assert not any("interleaved" in n for n in result.notes)


def test_loss_is_not_compared_across_tokenizers_and_bits_per_byte_is():
    other = make_report(corpus={**CORPUS, "tokenizer_sha256": "2" * 64}, **LATER)
    result = compare_reports(make_report(), other)
    assert {line.verdict for line in lines_of(result, "test loss")} == {"not compared"}
    assert all(line.ratio == 1 for line in lines_of(result, "test bits per byte"))
    assert any("Different tokenizers" in n and "loss is not" in n for n in result.notes)
    assert "not compared" in render_comparison(result)


def test_loss_is_not_compared_across_corpora():
    result = compare_reports(make_report(), make_report(corpus={**CORPUS, "sha256": "3" * 64}, **LATER))
    assert {line.verdict for line in lines_of(result, "test loss")} == {"not compared"}
    assert any("Different corpora" in n for n in result.notes)


def test_loss_is_compared_on_the_same_text():
    result = compare_reports(make_report(), make_report(**LATER))
    assert {line.verdict for line in lines_of(result, "test loss")} == {"single values"}


def test_other_lengths_or_threads_are_not_compared():
    results = change_results(make_results(), prompt_tokens=64)
    result = compare_reports(make_report(), make_report(results=results, **LATER))
    line = lines_of(result, "TTFT (ms)")[0]
    assert line.verdict == "not compared" and "prompt_tokens 128 and 64" in line.note


def test_other_machines_are_said():
    other = make_report(machine={**MACHINE, "cpu": {"model": "Other", "cores": 8}}, **LATER)
    assert any(
        "Different machines (Synthetic CPU 3.0 GHz; Other)" in n for n in compare_reports(make_report(), other).notes
    )


def test_a_bundles_record_is_compared_like_a_report():
    report = make_report()
    record = build_record(report, report.rows[3])
    result = compare_reports(record, make_report(results=make_results(seed=2), **LATER))
    assert {line.subject for line in result.lines} == {"optimized/int8-dyn", "optimized training"}


def test_without_a_common_artifact_the_chosen_ones_meet():
    report = make_report()
    left, right = build_record(report, report.rows[3]), build_record(report, report.rows[0])
    assert compare_reports(left, right).lines[0].subject == "optimized/int8-dyn / baseline/fp32"


def test_an_unknown_artifact_is_named_with_those_that_exist():
    with pytest.raises(ConfigError, match=r"no artifact 'optimized/int4' .it has baseline/fp32"):
        compare_reports(make_report(), make_report(), name_a="optimized/int4")


def test_every_format_has_the_same_lines():
    result = compare_reports(make_report(), make_report(results=make_results(seed=5), **LATER))
    values = json.loads(render_comparison(result, "json"))
    assert len(values["lines"]) == len(result.lines) and values["schema"] == 1
    assert len(list(csv.DictReader(io.StringIO(render_comparison(result, "csv"))))) == len(result.lines)
    assert render_comparison(result, "md").count("\n| ") == len(result.lines) + 1
    assert max(map(len, render_comparison(result).splitlines())) <= 100
