"""Verdicts over the peers: which cases a row compares, what it is held against, and when it means nothing."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: Milliseconds a token, the same in each round; a prompt takes ten times as long.
TOKEN_MS = {
    "ryot": {
        "int8": 2.1,
        "int8 kv8": 1.6,
        "int4": 1.2,
        "int4 kv8": 1.0,
        "int8-dyn+int4": 1.1,
        "int8-dyn+int4 kv8": 0.9,
    },
    "genai": {"int8 block 32": 2.4, "int8 block 128": 2.2, "int4 block 32": 1.8},
    "llama.cpp": {"Q8_0": 2.5, "Q8_0 flash": 2.4, "Q4_0": 1.3},
    "torch": {"fp32, no cache": 90.0, "fp32, KV cache": 9.0},
    "plain": {"fp32 plain export": 5.0},
}
ROUNDS = 6


@pytest.fixture(scope="module")
def judge():
    return runpy.run_path(str(BENCHMARKS / "peer_verdicts.py"))["judge"]


@pytest.fixture
def result():
    cases = {
        f"{artifact} / {family}": {
            "family": family,
            "artifact": artifact,
            "rounds": [{"token_ms": [ms], "ttft_ms": [10 * ms]}] * ROUNDS,
        }
        for family, artifacts in TOKEN_MS.items()
        for artifact, ms in artifacts.items()
    }
    blocks = {"int8_block_size": 128, "int4_block_size": 32}
    return {
        "size": "M",
        "cases": cases,
        "cold": {
            "int4 / capi": {
                "family": "ryot",
                "engine": "capi",
                "artifact": "int4",
                "peak_rss_bytes": [70e6, 72e6, 71e6],
                "cold_start_ms": [180.0, 200.0, 190.0],
            }
        },
        "decision": {"latency": "int8-dyn+int4", "one_session": "int4", "settings": blocks},
        "check": {},
    }


def rows_of(rows, group):
    return {row["title"]: row for row in rows if row["group"] == group}


def test_a_row_compares_the_fastest_forms_of_one_weight_format(judge, result):
    rows = rows_of(judge(result), "best artifact")
    q8 = rows["decode int8, llama.cpp Q8_0"]
    assert (q8["ours"], q8["theirs"]) == ("int8 kv8 / ryot", "Q8_0 flash / llama.cpp")
    assert [q8[name] for name in ("reached", "low", "high")] == pytest.approx([1.5] * 3)
    assert (q8["asked"], q8["verdict"]) == (1.2, "PASS")
    assert rows["decode int8, genai default block"]["theirs"] == "int8 block 32 / genai"
    assert rows["decode int8, genai our block"]["theirs"] == "int8 block 128 / genai"
    assert rows["decode int4, genai our block"]["theirs"] == "int4 block 32 / genai"
    assert rows["decode, torch without cache"]["ours"] == "int8-dyn+int4 kv8 / ryot"


def test_a_row_with_a_float32_cache_leaves_forms_with_another_out(judge, result):
    row = rows_of(judge(result), "best artifact")["decode int8, llama.cpp Q8_0, our cache float32"]
    assert row["ours"] == "int8 / ryot"
    assert row["reached"] == pytest.approx(2.4 / 2.1)
    assert (row["asked"], row["verdict"]) == (1.2, "short by 5%")


def test_a_row_says_when_its_interval_reaches_to_the_other_side(judge, result):
    result["cases"]["int8 kv8 / ryot"]["rounds"] = [
        {"token_ms": [ms], "ttft_ms": [20.0]} for ms in (1.6, 1.9, 2.4, 1.7, 1.8, 2.3)
    ]
    row = rows_of(judge(result), "best artifact")["decode int8, llama.cpp Q8_0"]
    assert row["low"] < 1.2 < row["reached"] < row["high"]
    assert row["verdict"] == "PASS, interval holds what was asked"


def test_a_chosen_form_is_held_only_against_what_was_asked_of_its_weights(judge, result):
    rows = rows_of(judge(result), "tool's choice for latency: int8-dyn+int4")
    eight, four = rows["decode int8, llama.cpp Q8_0"], rows["decode int4, llama.cpp Q4_0"]
    assert (eight["asked"], eight["verdict"], eight["ours"]) == (None, "", "int8-dyn+int4 / ryot")
    assert (four["asked"], four["verdict"]) == (1.0, "PASS")
    assert rows["decode, torch without cache"]["asked"] == 65
    one_session = rows_of(judge(result), "tool's choice for one session: int4")
    assert one_session["peak RSS, one session"]["reached"] == pytest.approx(71)
    assert one_session["peak RSS, one session"]["verdict"] == "PASS"
    assert one_session["cold start to first token"]["verdict"].startswith("short by 12%")


def test_a_peer_that_makes_other_tokens_voids_its_rows_and_no_other(judge, result):
    result["check"] = {"fp32 / genai": {"family": "genai", "wrong_at": 3}}
    rows = rows_of(judge(result), "best artifact")
    assert rows["TTFT, genai"]["verdict"] == "VOID: fp32 / genai makes another token at 3"
    assert rows["decode int8, llama.cpp Q8_0"]["verdict"] == "PASS"


def test_a_peer_that_is_missing_is_not_measured(judge, result):
    result["cases"] = {name: case for name, case in result["cases"].items() if case["family"] != "llama.cpp"}
    assert rows_of(judge(result), "best artifact")["decode int8, llama.cpp Q8_0"]["verdict"] == "not measured"
