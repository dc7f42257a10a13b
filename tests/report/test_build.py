"""Every number of the table is computed from what the report keeps: an independent reader gets the same ones."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from operator import truediv

import pytest

from ryot.artifact import ArtifactId
from ryot.events import EvalEvent, StepEvent
from ryot.report.build import build_ablation, build_report
from ryot.report.curves import curves_from_events
from ryot.report.render import render
from ryot.report.rows import VariantRow, report_to_dict
from ryot.report.stats import ratio_interval, value_interval
from ryot.report.targets import load_target

from .synthetic import (
    ARTIFACTS,
    CORPUS,
    MACHINE,
    change_results,
    make_artifacts,
    make_report,
    make_results,
    make_variants,
)


def test_the_whole_table_is_recomputed_from_the_raw_samples():
    report = make_report(targets=[load_target("phase1"), load_target("pi-zero-2w")])
    stored = json.loads(json.dumps(report_to_dict(report)))
    table = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    trainings = {(v["name"], v["seed"]): v for v in stored["variants"]}
    base = next(r for r in stored["rows"] if (r["variant"], r["precision"]) == ("baseline", "fp32"))

    def medians(row, metric):
        found = {}
        for sample in row["samples"]:
            value = sample[metric]
            found[sample["round"]] = statistics.median(value) if isinstance(value, list) else value
        return found

    def numbers(text):
        return float(text) if text else None

    assert len(table) == len(stored["rows"]) == 4
    for line, row in zip(table, stored["rows"]):
        training = trainings[row["variant"], row["seed"]]
        assert float(line["params"]) == training["params"] / 1e6
        assert float(line["train_s"]) == training["train_wall_s"]
        assert float(line["loss"]) == training["test_loss"]
        assert float(line["size_mb"]) == row["size_bytes"] / 1e6
        for metric in ("ttft_ms", "decode_tok_s", "load_ms", "e2e_ttft_ms"):
            value = statistics.median(medians(row, metric).values())
            assert float(line[metric]) == pytest.approx(value, rel=1e-12)
            assert row[metric] == pytest.approx(value, rel=1e-12)
        peak = max(max(s["peak_rss_bytes"], s["peak_rss_outside_bytes"]) for s in row["samples"])
        assert float(line["peak_rss_mb"]) == peak / 1e6
        for key, scale in (("bpb_ratio", 1), ("kl", 1), ("top1", 100)):
            assert float(line[key]) == pytest.approx(row["quality"][key] * scale)
        for metric in ("ttft_ms", "decode_tok_s"):
            samples = [s[metric] for s in row["samples"]]
            interval = value_interval(samples)
            assert numbers(line[f"{metric}_low"]) == pytest.approx(interval.low, rel=1e-9)
            assert numbers(line[f"{metric}_high"]) == pytest.approx(interval.high, rel=1e-9)
            # Never narrower than Student's interval on the logs of the round medians (t at 2 degrees is 6.9646).
            logs = [math.log(v) for v in medians(row, metric).values()]
            least = 2 * 6.9645 * statistics.stdev(logs) / math.sqrt(3)
            assert math.log(interval.high / interval.low) >= least * (1 - 1e-9)
            if row is base:
                assert line[f"{metric}_vs_baseline_ratio"] == ""
                continue
            theirs = {s["round"]: s[metric] for s in base["samples"]}
            turns = [statistics.median(map(truediv, s[metric], theirs[s["round"]])) for s in row["samples"]]
            ratio = math.exp(statistics.median(map(math.log, turns)))
            assert float(line[f"{metric}_vs_baseline_ratio"]) == pytest.approx(ratio, rel=1e-9)
            paired = ratio_interval(samples, [s[metric] for s in base["samples"]])
            assert float(line[f"{metric}_vs_baseline_low"]) == pytest.approx(paired.low, rel=1e-9)
            assert float(line[f"{metric}_vs_baseline_high"]) == pytest.approx(paired.high, rel=1e-9)
            expected = "no difference" if paired.low <= 1 <= paired.high else "lower" if paired.high < 1 else "higher"
            assert line[f"{metric}_vs_baseline_verdict"] == expected
        passes = (
            row["intervals"]["ttft_ms"][1] <= 120
            and row["intervals"]["decode_tok_s"][0] >= 25
            and peak <= 500e6
            and row["quality"]["bpb_ratio"] <= 1.01
        )
        assert line["verdict_phase1"] == ("PASS" if passes else "FAIL")
    for row in stored["rows"]:
        latencies = sorted(v for s in row["samples"] for run in s["token_ms"] for v in run)
        assert row["percentiles"]["token_ms"]["p50"] == pytest.approx(statistics.median(latencies))


def test_every_printed_number_stands_in_the_recomputed_report():
    # The terminal's figures are the stored ones, rounded: nothing is computed in the renderer.
    report = make_report()
    text = render(report)
    for row in report.rows:
        line = next(x for x in text.splitlines() if x.startswith(row.variant) and f" {row.precision} " in x)
        for cell in (f"{row.ttft_ms:.2f}", f"{row.decode_tok_s:.0f}", f"{row.peak_rss_bytes / 1e6:.1f}"):
            assert cell in line.split()


def test_a_artifact_that_dies_fails_with_the_reason_and_the_others_stand():
    results = change_results(
        make_results(), ArtifactId("optimized", 0, "int8-dyn"), rounds=1, ok=False,
        reason="killed by the memory limit of 60 MB", ttft_ms=[], decode_tok_s=[], token_ms=[], peak_rss_bytes=None,
        peak_rss_outside_bytes=None, load_ms=None,
    )  # fmt: skip
    report = make_report(results=results)
    dead = report.rows[3]
    assert (dead.runs, dead.runs_ok) == (3, 2)
    assert dead.verdicts["phase1"]["memory"] == "FAIL"
    assert "killed by the memory limit of 60 MB" in dead.reason
    assert any("killed by the memory limit" in n for n in report.notes)
    assert [r.verdicts["phase1"]["ttft"] for r in report.rows[:3]] == ["PASS"] * 3
    assert (report.choice.variant, report.choice.precision) == ("baseline", "int8-dyn")


def test_a_artifact_that_was_never_measured_has_a_row_without_figures():
    report = make_report(results={case: r for case, r in make_results().items() if case.precision == "fp32"})
    assert report.rows[1].ttft_ms is None
    assert report.rows[1].verdicts["phase1"]["ttft"] == "INCONCLUSIVE"
    assert not report.rows[1].pareto


def test_ratios_are_paired_by_the_number_of_the_round():
    results = make_results()
    # The baseline's round 0 is lost: only rounds 1 and 2 can be paired, whatever order the results came in.
    base, other = ArtifactId("baseline", 0, "fp32"), ArtifactId("optimized", 0, "int8-dyn")
    lost = {case: [r for r in reversed(found) if (case, r.round) != (base, 0)] for case, found in results.items()}
    report = make_report(results=lost)
    found = next(c for c in report.comparisons if c.metric == "ttft_ms" and c.a == str(other))
    assert found.b == str(base)
    by_round = {case: {r.round: r.ttft_ms for r in results[case]} for case in (base, other)}
    ratios = [statistics.median(map(truediv, by_round[other][k], by_round[base][k])) for k in (1, 2)]
    assert found.ratio == pytest.approx(math.sqrt(ratios[0] * ratios[1]), rel=1e-9)


def test_batches_are_kept_apart_from_single_sequences():
    both = {
        case: found
        + [dataclasses.replace(r, batch_size=16, decode_tok_s=[v * 9 for v in r.decode_tok_s]) for r in found]
        for case, found in make_results().items()
    }
    plain, report = make_report(), make_report(results=both)
    assert report.rows[0].decode_tok_s == plain.rows[0].decode_tok_s
    assert report.rows[0].batch_tok_s["16"] == pytest.approx(9 * plain.rows[0].decode_tok_s)
    assert "batch 16" in render(report)


def test_curves_keep_the_last_word_on_each_step_and_are_thinned():
    def step(tokens, loss):
        return StepEvent(
            variant="a", seed=0, step=tokens, num_steps=999, tokens=tokens, loss=loss, grad_norm=1.0,
            learning_rate=0.1, tokens_per_s=1.0, train_wall_s=tokens / 10, rss_bytes=1, cpu_s=1.0,
        )  # fmt: skip

    def evaluation(split, loss):
        return EvalEvent(
            variant="a", seed=0, step=1, tokens=10, train_wall_s=1.0, split=split, loss=loss, bits_per_byte=2.0
        )

    events = [step(10, 7.0), step(20, 6.0), step(20, 5.0), evaluation("val", 6.5), evaluation("test", 1.0)]
    held, seen = curves_from_events(events)["a", 0]
    assert held == ((10.0, 1.0, 6.5),)
    assert seen == ((10.0, 1.0, 7.0), (20.0, 2.0, 5.0))
    _, long = curves_from_events([step(k, 1.0) for k in range(1000)])["a", 0]
    assert len(long) == 200 and long[0][0] == 0 and long[-1][0] == 999


def test_time_to_the_baselines_loss_is_that_of_a_whole_training_that_reached_it():
    report = make_report()
    assert {v.name: v.time_to_baseline_loss_s for v in report.variants} == {"baseline": 129.6, "optimized": 24.9}
    slow = [make_variants()[0], VariantRow(name="x", seed=0, params=1, tokens=1, train_wall_s=5.0, val_loss=4.5)]
    assert make_report(variants=slow).variants[1].time_to_baseline_loss_s is None


def test_several_seeds_give_training_ratios_an_interval():
    def seeds(name, walls):
        return [
            VariantRow(name=name, seed=k, params=100, tokens=10, train_wall_s=w, val_loss=4.0)
            for k, w in enumerate(walls)
        ]

    report = make_report(variants=seeds("baseline", [100, 102, 98]) + seeds("optimized", [20, 21, 19]))
    found = next(c for c in report.comparisons if c.metric == "train_wall_s")
    assert found.low < 0.2 < found.high < 1 and found.verdict == "lower"
    single = next(c for c in make_report().comparisons if c.metric == "train_wall_s")
    assert (single.low, single.verdict, single.note) == (None, "single values", "concurrent")


def test_final_losses_of_several_seeds_are_tested_for_equality_and_said():
    def seeds(name, losses):
        return [
            VariantRow(name=name, seed=k, params=1, tokens=1, train_wall_s=1.0, val_loss=x, test_loss=x)
            for k, x in enumerate(losses)
        ]

    report = make_report(variants=seeds("baseline", [4.00, 4.01, 4.02]) + seeds("optimized", [4.00, 4.01, 4.02]))
    [line] = [n for n in report.notes if n.startswith("Final test loss")]
    assert "over 3 seeds: +0.000 [-0.017, +0.017] nats (90 %): equivalent at a margin of 0.05." in line
    assert not [n for n in make_report().notes if n.startswith("Final test loss")]


def test_an_ablation_is_made_of_the_variants_named_for_it():
    def variant(name, seed, wall):
        return VariantRow(name=name, seed=seed, params=1, tokens=1, train_wall_s=wall, val_loss=4.0)

    rows = build_ablation([variant("baseline", 0, 9.0), variant("baseline", 1, 8.0), variant("baseline+tied", 0, 7.0)])
    assert [(r.name, r.train_wall_s) for r in rows] == [("baseline", (9.0, 8.0)), ("baseline+tied", (7.0,))]
    assert build_ablation(make_variants()) == []
    # A training that a gate stopped has figures of its own, but none of an ablation's.
    stopped = dataclasses.replace(variant("baseline+rates", 0, 1.0), failed="gate loss: loss is nan")
    assert [r.name for r in build_ablation([variant("baseline", 0, 9.0), stopped])] == ["baseline"]


def test_a_bundle_alone_can_be_measured_without_any_training_known():
    report = build_report(
        run_id="bench", command="ryot-deploy bench", artifacts=make_artifacts()[3:], results=make_results(),
        targets=[load_target("phase1")], machine=MACHINE, corpus=CORPUS,
    )  # fmt: skip
    assert report.baseline == "optimized/seed-0/int8-dyn"
    assert report.choice.exit_code == 0
    assert "optimized" in render(report)


def test_a_quick_run_and_a_noisy_machine_are_said():
    results = change_results(make_results(), ArtifactId("baseline", 0, "fp32"), rounds=1, calibration_ms=[20.0, 40.0])
    notes = " ".join(make_report(results=results, quick=True).notes)
    assert "not comparable" in notes and "Noisy machine" in notes


def test_the_synthetic_artifacts_cover_both_variants_and_precisions():
    assert len(ARTIFACTS) == len(make_artifacts()) == 4
