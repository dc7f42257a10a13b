"""A report is kept whole, read back equal, and checked by a schema."""

from __future__ import annotations

import json

import jsonschema
import pytest

from ryot.errors import ConfigError
from ryot.report.rows import (
    SCHEMA,
    build_record,
    find_report,
    load_report,
    load_schema,
    report_to_dict,
    save_report,
)

from .synthetic import make_artifacts, make_report


def test_a_saved_report_is_valid_and_reads_back_equal(report, tmp_path):
    save_report(report, tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    jsonschema.Draft202012Validator(load_schema()).validate(values)
    assert report_to_dict(load_report(tmp_path)) == values
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


def test_the_schema_is_one_itself_and_refuses_a_wrong_report(report):
    jsonschema.Draft202012Validator.check_schema(load_schema())
    values = report_to_dict(report)
    values["rows"][0]["verdicts"]["phase1"]["ttft"] = "OK"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, load_schema())


def test_a_report_of_a_run_where_everything_failed_is_valid_too():
    report = make_report(artifacts=make_artifacts(passed=False, reason="logits differ by 3"), results={}, variants=[])
    jsonschema.validate(report_to_dict(report), load_schema())
    assert report.choice.exit_code == 4


def test_the_contract_fields_are_there(report):
    values = report_to_dict(report)
    assert values["schema"] == SCHEMA
    assert {"run_id", "command", "machine", "corpus", "variants", "rows", "comparisons", "bundle"} <= set(values)
    row = values["rows"][0]
    assert set(row["verdicts"]["phase1"]) == {"ttft", "throughput", "memory", "size", "quality", "context"}
    assert row["verdicts"]["phase1"]["ttft"] == "PASS"
    assert row["verdicts"]["phase1"]["size"] is None
    assert set(row["quality"]) == {"kl", "top1", "bpb", "bpb_ratio"}
    assert set(values["comparisons"][0]) >= {"metric", "a", "b", "ratio", "low", "high", "verdict"}


def test_a_record_is_the_part_of_one_artifact(report, tmp_path):
    row = report.rows[3]
    save_report(build_record(report, row), tmp_path / "record.json")
    record = load_report(tmp_path)
    jsonschema.validate(report_to_dict(record), load_schema())
    assert (record.kind, record.rows[0].id, len(record.rows)) == ("record", row.id, 1)
    assert {v.name for v in record.variants} == {"optimized"}
    assert {c.a for c in record.comparisons} == {str(row.id)}


def test_other_schemas_and_other_files_are_refused(report, tmp_path):
    path = tmp_path / "report.json"
    values = report_to_dict(report)
    for text, message in (
        (json.dumps({**values, "schema": 99}), "schema 99, this version reads schema 1 to 2"),
        (json.dumps({"hello": 1}), "not a ryot report"),
        ("[1, 2]", "not a ryot report"),
        (json.dumps(values)[:400], "cut short"),
        (json.dumps({"schema": 2, "run_id": "x"}), "not a complete ryot report"),
        (json.dumps({**values, "rows": [{"variant": "x"}]}), "not a complete ryot report"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"report\.json") as caught:
            load_report(path)
        assert message in str(caught.value)


def test_a_path_without_a_report_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds neither report\.json nor record\.json"):
        find_report(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        find_report(tmp_path / "nothing.json")


def test_numbers_that_are_not_finite_become_null(tmp_path):
    report = make_report(machine={"x": float("nan")})
    save_report(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["machine"]["x"] is None
