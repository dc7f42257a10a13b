"""Quality beside speed: the protocol of scoring, which point stands for us, and when it passes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_unscored
from ryot.models.sources.folder import open_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WINDOWS, CONTEXT = 3, 24
LENGTHS = {
    "prompt": 128,
    "long_prompt": 2048,
    "depths": [32, 512],
    "long_depth": 4096,
    "cold_steps": 32,
    "window": 512,
    "windows": 4,
}
#: Name: (family, MB, nats of each window, milliseconds of everything, over which a prompt takes ten times as long).
POINTS = {
    "int8": ("ryot", 140, [100.0, 200.0, 150.0, 120.0], 8.0),
    "int4": ("ryot", 80, [103.0, 207.0, 154.0, 124.0], 4.0),
    "Q8_0": ("llama.cpp", 144, [100.1, 199.9, 150.1, 119.9], 10.0),
    "Q4_K_M": ("llama.cpp", 105, [102.0, 205.0, 153.0, 123.0], 6.0),
}


@pytest.fixture(scope="module")
def modules():
    """The benchmark's modules, which find each other beside the script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import quality_verdicts
        import quality_worker
        import record
    finally:
        sys.path.remove(str(BENCHMARKS))
    return quality_verdicts, quality_worker, record


@pytest.fixture
def values():
    def series(ms: float) -> dict[str, list[list[float]]]:
        found = {f"token@{depth}": [[ms]] * 5 for depth in (32, 512, 4096)}
        return found | {f"ttft@{length}": [[10 * ms]] * 5 for length in (128, 2048)}

    points = [
        {"name": name, "family": family, "size_bytes": size * 10**6, "step_bytes": None}
        for name, (family, size, _, _) in POINTS.items()
    ]
    return {
        "lengths": LENGTHS,
        "made": {"points": points},
        "quality": {"points": {name: {"bpb": sum(nats), "nats": nats} for name, (_, _, nats, _) in POINTS.items()}},
        "threads": {"1": {"points": {name: {"series": series(ms)} for name, (_, _, _, ms) in POINTS.items()}}},
    }


def rows_of(modules, values):
    return {row["goal"].partition(" at no worse")[0]: row for row in modules[0].judge(values, "1")}


def test_only_a_point_of_no_worse_quality_stands_for_us(modules, values):
    rows = rows_of(modules, values)
    # int4 is faster and worse; int8's loss is that of Q8_0 in total, window by window a little above or below.
    q8 = rows["decode at depth 512: 1.1x Q8_0"]
    assert (q8["ours"], q8["verdict"]) == ("int8", "PASS")
    assert q8["ratio"] == pytest.approx([1.25] * 3)
    assert rows["TTFT of 128 tokens: 2x Q8_0"]["verdict"] == "FAIL by 38%"
    assert rows["decode at depth 32: 1.1x Q4_K_M"]["ours"] == "int8"
    assert rows["decode at depth 32: 1.1x Q4_K_M"]["verdict"] == "FAIL by 32%"


def test_a_peer_is_matched_by_one_point_in_everything(modules, values):
    rows = rows_of(modules, values)
    goal = "one of ours at least as good as {} in bits per byte, TTFT, decode, at most 1.1x its size"
    assert rows[goal.format("Q8_0")]["verdict"] == "PASS"
    # int8 is slower and larger than Q4_K_M; int4 lacks quality alone.
    assert rows[goal.format("Q4_K_M")]["ours"] == "int4"
    assert rows[goal.format("Q4_K_M")]["verdict"] == "FAIL: bits per byte 1.0086"


def test_what_was_not_measured_passes_nothing(modules, values):
    values["threads"]["1"]["points"]["int8"]["series"].pop("token@4096")
    rows = rows_of(modules, values)
    assert rows["decode at depth 4096: 1.1x Q8_0"]["verdict"] == "not measured"
    goal = "one of ours at least as good as Q8_0 in bits per byte, TTFT, decode, at most 1.1x its size"
    assert "token@4096 not measured" in rows[goal]["verdict"]
    values["quality"]["points"].clear()
    assert {row["verdict"] for row in modules[0].judge(values, "1")} == {"not measured"}


def test_a_frontier_keeps_what_nothing_beats(modules):
    assert modules[0].frontier([(3.0, 1.0), (1.0, 2.0), (2.0, 2.5), (4.0, 1.5)]) == [(1.0, 2.0), (3.0, 1.0)]


def test_windows_are_scored_by_llama_perplexity_s_protocol(modules, hf_checkpoint, tmp_path):
    """transformers on whole windows; a graph reads them in pieces and the sums are of float32 logits."""
    from transformers import AutoModelForCausalLM

    checkpoint = hf_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    windows = np.random.default_rng(0).integers(1, model.config.vocab_size, (WINDOWS, CONTEXT))
    np.save(tmp_path / "windows.npy", windows)
    bundle = export_unscored(
        open_folder(checkpoint), "fp32", tmp_path / "fp32", options=ExportOptions(), prompts=windows[:1]
    )
    graph = bundle / json.loads((bundle / "ryot_manifest.json").read_text())["graphs"]["standard"]
    with torch.no_grad():
        logits = model(torch.from_numpy(windows)).logits.log_softmax(-1)
    first = CONTEXT // 2
    expected = [
        -sum(float(logits[row, p, windows[row, p + 1]]) for p in range(first, CONTEXT - 1)) for row in range(WINDOWS)
    ]
    # A logit's rounding error is some 1e-6 of its size; a window sums 11 of them.
    reference = tmp_path / "reference"
    alone = modules[1].score_graph(tmp_path, graph, write=reference)
    assert (alone.nats, alone.kl, alone.top1) == (pytest.approx(expected, rel=1e-5), None, None)
    # Held against a distribution that is this one but for one token in each row.
    written = np.fromfile(reference, np.float32).reshape(-1, model.config.vocab_size)
    assert len(written) == WINDOWS * (CONTEXT - first - 1)
    assert written[0] == pytest.approx(logits[0, first].numpy(), abs=1e-4)
    other = torch.from_numpy(np.where(np.arange(model.config.vocab_size) == 3, 9, written)).log_softmax(-1)
    other.numpy().tofile(reference)
    beside = modules[1].score_graph(tmp_path, graph, beside=reference)
    expected_kl = torch.nn.functional.kl_div(torch.from_numpy(written), other, log_target=True, reduction="batchmean")
    assert (beside.nats, beside.top1) == (alone.nats, 0.0)
    assert beside.kl == pytest.approx(float(expected_kl), rel=1e-4)


def test_a_row_of_llama_perplexity_beside_a_reference_is_read(modules):
    text = (
        "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              \u0394p RMS   "
        "         Same top p\n"
        "   1      15.9204 \u00b1   12.3733      -0.01967 \u00b1    0.01930       0.00397 \u00b1    0.00058     "
        "1.229 \u00b1  0.304 %    100.000 \u00b1  0.000 %\n"
        "  16       8.2253 \u00b1    0.3272       0.00562 \u00b1    0.00147       0.00410 \u00b1    0.00009     "
        "1.747 \u00b1  0.050 %    96.667 \u00b1  0.281 %\n"
    )
    assert modules[1].RUNNING_BESIDE.findall(text) == [
        ("15.9204", "0.00397", "100.000"),
        ("8.2253", "0.00410", "96.667"),
    ]


def test_a_result_has_a_line_for_each_series(modules):
    values = {"a": [{"b": [1.5, 2], "c": {}}, 3], "d": [[1], [2]], "e": "x", "f": [], "g": None}
    text = modules[2].dump_compact(values)
    assert json.loads(text) == values
    assert ' "d": [[1], [2]],' in text.splitlines()
