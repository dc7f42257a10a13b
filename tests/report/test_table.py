"""The tables fit, show what varies, and say the same in every format."""

from __future__ import annotations

import csv
import io
import json

import pytest

from ryot.artifact import ArtifactId
from ryot.report.columns import artifact_columns
from ryot.report.render import render
from ryot.report.rows import load_schema, report_from_dict
from ryot.report.table import Column, decimals_for, wrap
from ryot.report.targets import load_target

from .synthetic import ARTIFACTS, change_results, make_artifacts, make_report, make_results

MANY = {
    (variant, precision): values
    for variant in ("baseline", "optimized", "a-variant-with-a-name")
    for precision in ("fp32", "int8-dyn", "int8-dyn+int4")
    for values in [ARTIFACTS["optimized", "int8-dyn"]]
}


def many(**changes):
    return make_report(artifacts=make_artifacts(MANY), results=make_results(artifacts=MANY), **changes)


@pytest.mark.parametrize(
    "report",
    [
        make_report(),
        many(),
        many(targets=[load_target(n) for n in ("phase1", "pi-5", "ryzen-laptop", "browser-tab")]),
        make_report(results={}, targets=[load_target("pi-5")]),
    ],
    ids=["default", "many", "targets", "unmeasured"],
)
def test_no_line_of_the_terminals_table_is_wider_than_100_columns(report):
    text = render(report)
    assert max(len(line) for line in text.splitlines()) <= 100
    for row in report.rows:
        assert f"{row.variant}" in text and row.precision in text


def test_the_main_block_has_figures_ratio_and_verdict_together():
    block = render(make_report()).split("\n\n")[0].splitlines()
    for word in ("params", "train*", "loss", "size", "TTFT", "decode", "memory", "tok/s ratio", "phase1"):
        assert word in block[0]
    assert block[1].split() == ["M", "s", "nats", "MB", "ms", "tok/s", "MB", "[98", "%]"]
    assert block[3].split()[:5] == ["baseline", "fp32", "2.14", "129.6", "3.95"]
    assert len(block) == 3 + 4


def test_numbers_of_a_column_end_at_the_same_place():
    block = render(make_report()).split("\n\n")[0].splitlines()
    ends = {line.index(cell) + len(cell) for line, cell in zip(block[3:], ("8.61", "2.31", "5.35", "1.47"))}
    assert len(ends) == 1


def test_columns_that_do_not_vary_are_said_once_below():
    text = render(make_report())
    assert "seed" not in text.split("\n\n")[0]
    assert "Same for all rows: seed 0." in text
    one = render(make_report(variants=[]))
    assert "params" not in one.split("\n\n")[0]


def test_concurrent_training_times_are_labelled():
    assert "* concurrent: these trained at the same time on one machine" in render(make_report())


def test_no_difference_is_marked():
    artifacts = {k: v for k, v in ARTIFACTS.items() if k[0] == "baseline"}
    artifacts["baseline", "int8-dyn"] = artifacts["baseline", "fp32"]
    text = render(make_report(artifacts=make_artifacts(artifacts), results=make_results(artifacts=artifacts)))
    line = next(x for x in text.splitlines() if x.startswith("baseline") and "int8-dyn" in x)
    assert "] =" in line


def test_the_second_table_has_every_limit_of_the_chosen_artifact():
    report = make_report()
    table = render(report).split("\n\n")[2].splitlines()
    assert table[0].split("  ")[0] == "target" and "value [98 %]" in table[0]
    assert [line.split("  ")[0] for line in table[2:]] == ["phase1"] * 4
    assert "TTFT ≤ 120 ms" in table[2]
    assert table[4].endswith("PASS (checked)")


def test_a_artifact_that_misses_a_limit_is_listed_with_its_reason():
    died = {"ok": False, "reason": "timed out after 120 s"}
    results = change_results(make_results(), ArtifactId("baseline", 0, "fp32"), **died)
    text = render(make_report(results=results))
    assert "FAIL (3 of 3 died)" in text.split("\n\n")[2]
    assert "baseline fp32: 3 of 3 processes failed: timed out after 120 s" in text
    assert "baseline fp32" in text.split("\n\n")[2]


def test_json_is_the_whole_report():
    import jsonschema

    values = json.loads(render(make_report(), "json"))
    jsonschema.validate(values, load_schema())
    assert report_from_dict(values, "x").rows[0].samples[0].ttft_ms


def test_csv_has_a_line_an_artifact_in_full_precision():
    report = make_report()
    lines = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    assert [float(x["ttft_ms"]) for x in lines] == [r.ttft_ms for r in report.rows]
    assert lines[3]["chosen"] == "True"


def test_markdown_has_one_header_line_with_units():
    text = render(make_report(), "md")
    assert text.splitlines()[0].count("|") == text.splitlines()[2].count("|")
    assert "size (MB)" in text.splitlines()[0]


def test_every_format_renders_an_empty_report():
    report = make_report(artifacts=[], results={}, variants=[])
    assert render(report) == report.choice.reason == "No artifact passed the gates (nothing was exported)."
    assert render(report, "md") == ""
    assert [line.split(",")[0] for line in render(report, "csv").splitlines()] == ["variant"]
    assert json.loads(render(report, "json"))["rows"] == []
    assert report.choice.exit_code == 4


def test_decimals_follow_the_smallest_number():
    assert [decimals_for(x) for x in ([8275, 3900], [4.9, 12.0], [0.0017, 0.5], [])] == [0, 2, 4, 2]
    assert Column("x", "x", (1.0, None, 22.5)).texts() == ["1.00", "-", "22.50"]


def test_wrap_keeps_words_whole():
    lines = wrap("one two three four", 9).splitlines()
    assert lines == ["one two", "  three", "  four"]


def test_every_target_gets_its_own_verdict_column():
    names = [c.header for c in artifact_columns(make_report(targets=[load_target("phase1"), load_target("pi-5")]))]
    assert names[-2:] == ["phase1", "pi-5"]
