"""A verdict follows from the interval and the limit, and says how far it reaches."""

from __future__ import annotations

import dataclasses

import pytest

from ryot.artifact import ArtifactId
from ryot.report.build import build_row
from ryot.report.rows import Cause
from ryot.report.targets import build_target, load_target
from ryot.report.verdicts import judge_artifact, overall, place_note, verdict_words

from .synthetic import MACHINE, change_results, make_artifacts, make_results

ID = ArtifactId("optimized", 0, "int8-dyn")


def artifact(**changes):
    results = change_results(make_results(), **changes)[ID]
    return build_row(make_artifacts()[3], results)


def judge(row, **limits):
    (verdict,) = judge_artifact(row, build_target("t", {"limits": limits}, "t"), MACHINE)
    return verdict


def test_pass_fail_and_inconclusive_follow_the_interval():
    row = artifact()
    low, high = row.intervals["ttft_ms"]
    assert judge(row, ttft_ms=high * 1.001).verdict == "PASS"
    assert judge(row, ttft_ms=low * 0.999).verdict == "FAIL"
    assert judge(row, ttft_ms=row.ttft_ms).verdict == "INCONCLUSIVE"
    low, high = row.intervals["decode_tok_s"]
    assert judge(row, decode_tok_s=low * 0.999).verdict == "PASS"
    assert judge(row, decode_tok_s=high * 1.001).verdict == "FAIL"
    assert judge(row, decode_tok_s=row.decode_tok_s).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("key", "passing", "failing"),
    [("size_mb", 1.47, 1.46), ("bpb_ratio", 1.0034, 1.0033), ("context_tokens", 128, 129), ("peak_rss_mb", 60, 50)],
)
def test_exact_figures_pass_at_the_limit_itself(key, passing, failing):
    row = artifact()
    assert judge(row, **{key: passing}).verdict == "PASS"
    assert judge(row, **{key: failing}).verdict == "FAIL"


def test_memory_between_two_processes_peaks_is_inconclusive():
    results = [
        dataclasses.replace(r, peak_rss_bytes=peak, peak_rss_outside_bytes=peak)
        for r, peak in zip(make_results()[ID], (50_000_000, 55_000_000, 60_000_000))
    ]
    row = build_row(make_artifacts()[3], results)
    assert row.peak_rss_bytes == 60_000_000
    assert judge(row, peak_rss_mb=55).verdict == "INCONCLUSIVE"
    assert judge(row, peak_rss_mb=60).verdict == "PASS"


def test_memory_is_enforced_only_under_a_limit_no_looser_than_the_targets():
    assert judge(artifact(), peak_rss_mb=100).note == "checked"
    enforced = artifact(memory_limit="enforced", memory_limit_bytes=100_000_000)
    assert judge(enforced, peak_rss_mb=100).note == "enforced"
    assert judge(enforced, peak_rss_mb=80).note == "checked"


def test_a_dead_process_fails_what_it_was_to_measure_and_nothing_else():
    row = artifact(ok=False, reason="out of memory at 60 MB")
    words = verdict_words(judge_artifact(row, load_target("pi-zero-2w"), MACHINE))
    assert (words["ttft"], words["throughput"], words["memory"]) == ("FAIL", "FAIL", "FAIL")
    assert (words["size"], words["quality"], words["context"]) == ("PASS", "PASS", "PASS")
    assert judge(row, peak_rss_mb=60).cause is Cause.DIED
    assert judge(row, peak_rss_mb=60).note == "3 of 3 processes failed: out of memory at 60 MB"


def test_more_threads_than_the_target_has_prove_nothing():
    row = artifact(threads=2)
    verdict = judge(row, ttft_ms=100)
    assert (verdict.verdict, verdict.cause) == ("INCONCLUSIVE", Cause.THREADS)
    assert verdict.note == "measured with 2 threads, the target has 1"
    assert judge(row, ttft_ms=0.1).verdict == "FAIL"


def test_fewer_threads_than_the_target_has_can_pass_it_but_not_fail_it():
    row, device = artifact(threads=1), {"name": "D", "cores": 4, "threads": 4, "ram_mb": 1000, "isa": []}

    def on_device(limit):
        target = build_target("t", {"limits": {"ttft_ms": limit}, "device": device}, "t")
        (verdict,) = judge_artifact(row, target, MACHINE)
        return verdict

    assert on_device(100).verdict == "PASS"
    assert on_device(100).note == "measured under the target's limits on this CPU, with 1 of its 4 threads"
    assert on_device(0.1).verdict == "INCONCLUSIVE"
    assert on_device(0.1).note == "measured with 1 thread, the target has 4"


def test_the_note_never_claims_the_device():
    target = load_target("pi-zero-2w")
    verdict = judge_artifact(artifact(threads=4), target, MACHINE)[0]
    assert verdict.note == "measured under the target's limits on this CPU"
    assert place_note(target, MACHINE) == (
        "measured under the target's limits on this CPU (Synthetic CPU 3.0 GHz), not on Raspberry Pi Zero 2 W"
    )
    board = {"cpu": {"model": "Raspberry Pi Zero 2 W Rev 1.0"}}
    assert place_note(target, board).startswith("measured on the device")
    assert judge_artifact(artifact(threads=4), target, board)[0].note == ""
    assert place_note(load_target("phase1"), MACHINE) == "measured on this CPU (Synthetic CPU 3.0 GHz)"


def test_one_failing_limit_fails_the_artifact():
    assert overall({"a": "PASS", "b": None}) == "PASS"
    assert overall({"a": "PASS", "b": "INCONCLUSIVE"}) == "INCONCLUSIVE"
    assert overall({"a": "INCONCLUSIVE", "b": "FAIL"}) == "FAIL"
