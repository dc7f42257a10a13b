"""Decisions that were measured once: found again, and measured again where what was kept cannot be read."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from ryot.decisions import recall


@dataclass(frozen=True)
class Decision:
    block_size: int
    times: tuple[float, ...]


def test_a_decision_that_cannot_be_kept_still_counts(tmp_path, caplog):
    (tmp_path / "file").write_text("where the cache's folder should be")
    measured = Decision(64, (1.5,))
    assert recall(tmp_path / "file" / "one.json", Decision, lambda: measured) == (measured, False)
    assert "not kept, it will be measured again next time (File exists)" in caplog.text


def test_a_decision_is_measured_once(tmp_path):
    path = tmp_path / "shapes" / "one.json"
    measured = Decision(64, (1.5, 2.5))
    assert recall(path, Decision, lambda: measured) == (measured, False)
    assert recall(path, Decision, lambda: pytest.fail("measured again")) == (measured, True)
    assert [p.name for p in path.parent.iterdir()] == ["one.json"]


@pytest.mark.parametrize(
    "kept",
    [
        '{"block_size": 64, "tim',
        '{"block_size": 64}',
        '{"block_size": 64, "times": [1.5], "attention": "flash"}',
        '{"block_size": "64", "times": [1.5]}',
        "[]",
        "",
    ],
)
def test_what_cannot_be_read_is_measured_again_and_replaced(tmp_path, kept):
    path = tmp_path / "one.json"
    path.write_text(kept)
    measured = Decision(32, (9.0,))
    assert recall(path, Decision, lambda: measured) == (measured, False)
    assert json.loads(path.read_text()) == {"block_size": 32, "times": [9.0]}


def test_nothing_is_kept_of_a_measurement_that_fails(tmp_path):
    def measure():
        raise MemoryError

    with pytest.raises(MemoryError):
        recall(tmp_path / "one.json", Decision, measure)
    assert list(tmp_path.iterdir()) == []
