"""What each verifier says, and which tables are refused."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from ryot.edge.verifiers import Rights, build_verifier, parse_verifier
from ryot.errors import ConfigError

STRANGER = Rights(allowed=frozenset(), trusted=False)
DEEP: dict[str, object] = {}
for _ in range(300):
    DEEP = {"not": DEEP}


def rewards(table: dict[str, object], *answers: str, prompt: str = "") -> list[float]:
    return [verdict.reward for verdict in build_verifier(table).score(prompt, answers)]


@pytest.mark.parametrize(
    ("text", "reward"), [("x = 1\n", 1.0), ("x = 1\ny = (\n", 1 / 3), ("x = = 1", 0.0), ("a\0", 0.0), ("", 1.0)]
)
def test_python_is_rewarded_by_how_far_it_parses(text: str, reward: float) -> None:
    assert rewards({"kind": "python"}, text) == [pytest.approx(reward)]


@pytest.mark.parametrize(
    ("text", "reward"), [('{"a": [1, 2]}', 1.0), ("[1, x]", 4 / 6), ("", 0.0), ("[" * 100_000, 0.0), ("9" * 9999, 0.0)]
)
def test_json_is_rewarded_by_how_far_it_parses(text: str, reward: float) -> None:
    assert rewards({"kind": "json"}, text) == [pytest.approx(reward)]


def test_a_schema_wants_more_than_json() -> None:
    table: dict[str, object] = {"kind": "json_schema", "schema": {"type": "object", "required": ["a"]}}
    assert rewards(table, '{"a": 1}', "{}", "3", "[1, x") == [1.0, 0.5, 0.5, pytest.approx(0.5 * 4 / 5)]


def test_a_schema_fetches_nothing() -> None:
    verifier = build_verifier({"kind": "json_schema", "schema": {"$ref": "http://127.0.0.1:1/other.json"}})
    with pytest.raises(ConfigError, match=r"verifier.schema: refers to 'http://127.0.0.1:1/other.json'"):
        verifier.check("{}")


def test_answers_that_are_known() -> None:
    assert rewards({"kind": "exact", "answer": "42"}, " 42\n", "42.", "") == [1, 0, 0]
    assert rewards({"kind": "number", "answer": 1234}, "so 3 and 1,234.", "1234.0", "12345", "none") == [1, 1, 0, 0]
    assert rewards({"kind": "number", "answer": 0.5, "tolerance": 0.01}, "0.505", "-0.5") == [1, 0]
    assert rewards({"kind": "regex", "pattern": "^a.*z$"}, "a\nz", "ab") == [1, 0]


def test_the_majority_is_what_most_candidates_say() -> None:
    assert rewards({"kind": "majority"}, "7", "8", " 7", "7") == [0.75, 0.25, 0.75, 0.75]
    table: dict[str, object] = {"kind": "majority", "pattern": r"= (\d+)"}
    assert rewards(table, "1+1 = 2", "it = 2", "no") == [pytest.approx(2 / 3), pytest.approx(2 / 3), 0]


def count_words(prompt: str, answer: str, *, wanted: int = 2) -> float:
    """An operator's own verifier."""
    return min(1.0, (len(prompt.split()) + len(answer.split())) / wanted)


def test_a_function_of_ones_own_decides() -> None:
    table: dict[str, object] = {"kind": "entry_point", "function": f"{__name__}:count_words", "options": {"wanted": 4}}
    assert rewards(table, "b c d", "b", prompt="a") == [1.0, 0.5]
    with pytest.raises(ConfigError, match=r"returned 'x', expected a number from 0 to 1"):
        rewards({"kind": "entry_point", "function": "builtins:max"}, "", prompt="x")


def test_the_prompt_is_looked_at_where_that_is_asked_for() -> None:
    assert rewards({"kind": "json", "with_prompt": True}, "1]", prompt="[") == [1.0]
    assert rewards({"kind": "json"}, "1]", prompt="[") == [0.5]


def test_python_is_run_with_tests_and_cannot_pass_by_ending_early() -> None:
    table: dict[str, object] = {
        "kind": "python",
        "tests": "assert double(2) == 4\nassert double(3) == 6",
        "limits": {"wall_s": 2},
    }
    found = build_verifier(table).score(
        "",
        [
            "def double(x): return 2 * x",
            "def double(x): return x + 2",
            "import os\nos._exit(0)",
            "raise SystemExit(0)",
            "print('passed')",
            "while True: pass",
            "def double(",
            "import os\nfor _ in range(99):\n    os.fork()",
        ],
    )
    assert [verdict.reward for verdict in found] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert "AssertionError" in found[1].detail
    assert found[2].detail == "ended before its tests did"
    assert found[5].detail == "took too long"
    assert "NameError" in found[4].detail


def test_many_answers_are_reported_one_by_one() -> None:
    answers = [f"x = {number}" for number in range(40)]
    found = build_verifier({"kind": "python", "tests": "assert x % 3 == 0, 'y' * 400"}).score("", answers)
    assert [verdict.passed for verdict in found] == [number % 3 == 0 for number in range(40)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "rust"}, "verifier.kind: got 'rust', expected one of json, python, regex"),
        ({}, "verifier.kind: got None"),
        ({"kind": "regex", "pattern": "("}, "verifier.pattern: '(' is no regular expression"),
        ({"kind": "regex"}, "verifier.pattern: got None, expected a string"),
        ({"kind": "json", "schema": {}}, "verifier.schema: is no field of json"),
        ({"kind": "json_schema", "schema": {"type": "thing"}}, "verifier.schema: is no JSON schema"),
        ({"kind": "number", "answer": "4"}, "verifier.answer: got '4', expected a number"),
        ({"kind": "command", "command": []}, "verifier.command: got [], expected a command"),
        ({"kind": "command", "command": "true", "limits": {"hours": 1}}, "verifier.limits: got {'hours': 1}"),
        ({"kind": "command", "command": "true", "limits": {"wall_s": 0}}, "verifier.limits.wall_s: got 0"),
        ({"kind": "entry_point", "function": "nowhere:f"}, "verifier.function: 'nowhere:f' cannot be loaded"),
        ({"kind": "number", "answer": 10**400}, "verifier.answer: got 1000"),
        ({"kind": "json_schema", "schema": {"$schema": []}}, "verifier.schema: is no JSON schema"),
        ({"kind": "json_schema", "schema": DEEP}, "verifier.schema: is nested too deep"),
        ({"kind": "command", "command": "echo '"}, 'verifier.command: got "echo \'", expected a command'),
        ({"kind": "command", "command": ["a\0b"]}, "verifier.command: got ['a\\x00b'], expected a command"),
        ({"kind": "command", "command": "true", "limits": {"cpu_s": math.inf}}, "verifier.limits.cpu_s: got inf"),
        ({"kind": "command", "command": "true", "limits": {"cpu_s": 0.5}}, "verifier.limits.cpu_s: got 0.5"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_verifier(table)
    assert message in str(caught.value)


def test_a_command_line_names_a_verifier_by_a_word_or_a_table() -> None:
    assert parse_verifier("json") == {"kind": "json"}
    assert parse_verifier("regex=a=b") == {"kind": "regex", "pattern": "a=b"}
    assert parse_verifier("number=4") == {"kind": "number", "answer": 4}
    assert parse_verifier('{"kind": "json", "with_prompt": true}') == {"kind": "json", "with_prompt": True}
    for text in ("match=x", "json=3", "{", "number=x"):
        with pytest.raises(ConfigError, match="verifier: "):
            parse_verifier(text)


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "command", "command": "true"},
        {"kind": "python", "tests": "pass"},
        {"kind": "entry_point", "function": "builtins:max"},
    ],
)
def test_a_stranger_may_run_no_program_unless_allowed(table: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="runs programs, which is not allowed here"):
        build_verifier(table, STRANGER)
    allowed = Rights(allowed=frozenset(("command", "tests", "entry_point=builtins:max")), trusted=False)
    assert build_verifier(table, allowed).kind == table["kind"]


def test_a_stranger_calls_no_function_that_was_not_named(tmp_path: Path) -> None:
    # `timeit.timeit` runs its first argument, the prompt, as a program.
    table: dict[str, object] = {"kind": "entry_point", "function": "timeit:timeit", "options": {"number": 1}}
    for allowed in ("entry_point", f"entry_point={__name__}:count_words"):
        with pytest.raises(ConfigError, match="not allowed here"):
            build_verifier(table, Rights(frozenset((allowed,)), trusted=False)).score(
                f"open({str(tmp_path / 'written')!r}, 'w')", [""]
            )
    assert not (tmp_path / "written").exists()


def test_a_stranger_sets_no_limit_above_the_operators() -> None:
    allowed = Rights(allowed=frozenset(("command", "tests")), trusted=False)
    tables: list[dict[str, object]] = [{"kind": "command", "command": "true"}, {"kind": "python", "tests": "pass"}]
    for table in tables:
        for limits in ({"processes": 17}, {"wall_s": 10.5}, {"memory_bytes": 10**15}):
            with pytest.raises(ConfigError, match=r"expected at most \S+ from a client"):
                build_verifier(table | {"limits": limits}, allowed)
            assert build_verifier(table | {"limits": limits}).kind == table["kind"]
        assert build_verifier(table | {"limits": {"wall_s": 2, "processes": 16}}, allowed).kind == table["kind"]


def test_a_strangers_pattern_cannot_hang() -> None:
    began_s = time.monotonic()
    verifier = build_verifier({"kind": "regex", "pattern": "^(a+)+$", "with_prompt": True}, STRANGER)
    slow, fine = verifier.score("a", ["a" * 40 + "b", "a"])
    assert time.monotonic() - began_s < 60
    assert (slow.reward, slow.detail, fine.reward) == (0.0, "the check took too long", 1.0)
    schema = build_verifier({"kind": "json_schema", "schema": {"const": 1}}, STRANGER)
    assert [json.dumps(verdict.reward) for verdict in schema.score("", ["1", "2"])] == ["1.0", "0.5"]


@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_a_strangers_check_says_its_verdict_whatever_else_is_said() -> None:
    # Python warns of a set in a set on stderr.
    assert build_verifier({"kind": "regex", "pattern": "[[]"}, STRANGER).check("[").passed
    # As JSON a letter outside of the first plane takes twelve bytes.
    verdict = build_verifier({"kind": "json_schema", "schema": {"enum": ["\U00010348" * 400]}}, STRANGER).check("1")
    assert verdict.reward == 0.5 and verdict.detail.startswith("1 is not one of ['\U00010348")
