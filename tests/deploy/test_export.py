"""A variant exported in all precisions: gates, scores, golden prompts, and the bundle that leaves the house."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from ryot.config import PRECISIONS, ModelConfig
from ryot.deploy.answers import Answer
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.bundle import finish_bundle
from ryot.deploy.export import export_variant
from ryot.deploy.matrices import BlockMatrix, quantize_blocks
from ryot.deploy.precisions import num_bytes
from ryot.deploy.quality import LOOKS, evaluate_artifacts, evaluate_bundle, quality_windows, worst
from ryot.deploy.quantize import INT8_LOSS_SHARE, Quantizer
from ryot.deploy.runtime import runtime_modules
from ryot.deploy.settings import ExportSettings
from ryot.deploy.verify import check_parity, reference_logits
from ryot.deploy.weights import load_decoder_weights
from ryot.edge.bundle import load_bundle
from ryot.edge.generate import check_golden
from ryot.edge.session import OnnxruntimeEngine
from ryot.errors import BundleError, QualityError
from ryot.models.sources.folder import open_folder
from ryot.train.checkpoint import load_model, save_checkpoint
from ryot.train.model import Decoder

from .conftest import CONFIGS, CONTEXT, TextData

TRAIN_STEPS = 120


def train_briefly(cfg: ModelConfig, data) -> Decoder:
    """A decoder that has learned something, so that quantization can cost something."""
    torch.manual_seed(0)
    model = Decoder(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    windows = torch.from_numpy(data.windows("train", 1024, cfg.max_seq_len))
    for step in range(TRAIN_STEPS):
        batch = windows[torch.randint(len(windows), (16,), generator=torch.Generator().manual_seed(step))]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def trained(request, tmp_path_factory, tokenizer, data):
    path = tmp_path_factory.mktemp("trained") / request.param
    model = train_briefly(CONFIGS[request.param], data)
    save_checkpoint(path, spec=model.spec, state=model.state_dict(), tokenizer_json=tokenizer.to_str().encode())
    return path


def only(name):
    """For what is the same in both architectures, and takes seconds."""
    return pytest.mark.parametrize("trained", [name], indirect=True)


@pytest.fixture(scope="module")
def artifacts(trained, data, tmp_path_factory):
    options = ExportOptions(name="tiny", variant=trained.name, seed=3)
    results = export_variant(
        open_folder(trained), tmp_path_factory.mktemp("artifacts"), PRECISIONS, data, options=options
    )
    return {artifact.precision: artifact for artifact in results}


def test_scores_of_fp32_are_torchs_own(trained, artifacts, data):
    model, quality = load_model(trained), artifacts["fp32"].quality
    windows = torch.from_numpy(quality_windows(data, "test", model.spec.max_seq_len))[: quality.tokens // CONTEXT]
    with torch.no_grad():
        nats = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
    assert quality.tokens == windows[:, 1:].numel() >= LOOKS[0]
    # A mean over thousands of float32 losses that agree to about 1e-6 each.
    assert quality.loss == pytest.approx(nats / quality.tokens, rel=1e-5)
    text_bytes = data.byte_lengths[windows[:, 1:].numpy()].sum()
    assert quality.bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert (quality.kl, quality.top1, quality.bpb_ratio) == (0.0, 1.0, 1.0)


def test_fewer_bits_cost_more_and_all_artifacts_stay_within_the_limit(artifacts):
    assert [artifact.passed for artifact in artifacts.values()] == [True] * len(PRECISIONS)
    kl = {name: artifact.quality.kl for name, artifact in artifacts.items()}
    assert 0 < kl["int8"] < kl["int4"] < 0.1
    assert 0 < kl["int8-dyn"] < kl["int4"]
    assert artifacts["int4"].size_bytes < artifacts["int8"].size_bytes < artifacts["fp32"].size_bytes
    assert artifacts["int8-dyn+int4"].quality.kl >= kl["int4"]


def test_int4_candidates_are_recorded_and_the_smallest_is_tried_first(artifacts):
    record = load_bundle(artifacts["int4"].path).manifest["quantization"]["int4"]
    assert record["method"] == "gptq"
    first, *_ = record["candidates"]
    assert all(label.startswith("4 bits/") for label in first["formats"])
    assert record["bytes"] in {c["bytes"] for c in record["candidates"]}
    # No candidate within the limit is smaller than the one taken.
    assert min(c["bytes"] for c in record["candidates"] if c["bpb_ratio"] <= 1.0085) == record["bytes"]


def test_eight_bits_take_the_fastest_blocks_where_they_cost_little_and_small_ones_elsewhere(trained, data, tmp_path):
    weights = load_decoder_weights(open_folder(trained))

    def quantize(limit):
        found = Quantizer(weights, data, ExportSettings(int8_block_size=64), limit, tmp_path).quantize("int8")
        assert found.record["candidates"][0]["block_size"] == 64
        assert found.record["bytes"] == num_bytes(found.matrices)
        return found.record, {name: matrix.block_size for name, matrix in found.matrices.items()}

    record, sizes = quantize(1.5)
    assert "formats" not in record
    assert sizes["layers.0.attn.qkv"] == 64
    fastest = record["candidates"][0]
    # A little less than the fastest blocks cost, and nothing at all.
    record, some = quantize(1 + 0.6 * fastest["kl"] / fastest["reference_loss"] / INT8_LOSS_SHARE)
    assert record["formats"] == {name: f"8 bits/{size}" for name, size in some.items()}
    tight, most = quantize(1 + 1e-6)
    assert set(some.values()) | set(most.values()) <= {16, 32}
    assert fastest["bytes"] < sum(matrix_bytes(weights, some)) <= sum(matrix_bytes(weights, most))
    assert tight["expected_kl"] <= record["expected_kl"]


@only("llama")
def test_a_matrix_with_outliers_in_its_inputs_is_in_blocks_in_int8_dyn(trained, data, tmp_path):
    weights = load_decoder_weights(open_folder(trained))
    up, down = (weights[f"layers.1.{name}.weight"].copy() for name in ("gate_up", "down"))
    # What the decoder computes stays: one input of `down` is as large as all of a token's others are small beside it.
    up[-1] *= 3000
    down[:, -1] /= 3000
    uneven = dataclasses.replace(
        weights, arrays={**weights.arrays, "layers.1.gate_up.weight": up, "layers.1.down.weight": down}
    )

    def quantize(weights, limit):
        quantizer = Quantizer(weights, data, ExportSettings(dynamic_bits=8), limit, tmp_path)
        found = quantizer.quantize("int8-dyn")
        assert found.record["bytes"] == num_bytes(found.matrices)
        windows = quality_windows(data, "val", CONTEXT, tokens=512)
        graph = quantizer.graph(found.matrices)
        return found, evaluate_artifacts(quantizer.reference, {"mix": graph}, windows, data.byte_lengths)["mix"].kl

    even, _ = quantize(weights, 1.5)
    assert "in_blocks" not in even.record
    found, kl = quantize(uneven, 1.0001)
    assert "layers.1.down" in found.record["in_blocks"]
    assert len(found.record["in_blocks"]) < len(weights.linears) - 1
    in_blocks = {name for name, matrix in found.matrices.items() if isinstance(matrix, BlockMatrix)}
    assert in_blocks == {"embedding", *found.record["in_blocks"]}
    assert kl < 0.2 * found.record["candidates"][0]["kl"]


def matrix_bytes(weights, sizes):
    return [
        quantize_blocks(weights[f"{name}.weight"], bits=8, block_size=size).num_bytes for name, size in sizes.items()
    ]


@only("opt")
def test_matrices_go_to_eight_bits_until_a_tighter_limit_is_met(trained, data, tmp_path, artifacts):
    four = load_bundle(artifacts["int4"].path).manifest["quantization"]["int4"]["candidates"][0]
    lost = max(four["bpb_ratio"] - 1, four["kl"] / four["reference_loss"])
    # A limit between what 4 bits cost and what 8 bits cost.
    limit = 1 + lost / 3
    [artifact] = export_variant(
        open_folder(trained), tmp_path, ["int4"], data, options=ExportOptions(max_bpb_ratio=limit)
    )
    record = load_bundle(artifact.path).manifest["quantization"]["int4"]
    assert {label.split()[0] for label in record["formats"].values()} == {"4", "8"}
    assert four["bytes"] < record["bytes"] < artifacts["int8"].size_bytes
    chosen = next(c for c in record["candidates"] if c["bytes"] == record["bytes"])
    assert chosen["bpb_ratio"] <= limit
    smaller = [c for c in record["candidates"] if c["bytes"] < record["bytes"]]
    assert all(max(c["bpb_ratio"] - 1, c["kl"] / c["reference_loss"]) > 0.85 * (limit - 1) for c in smaller)


@only("llama")
def test_the_text_that_artifacts_are_scored_on_has_no_say_in_how_they_are_made(trained, data, tmp_path):
    asked = []

    class Asked(TextData):
        def windows(self, split, count, length):
            asked.append(split)
            return super().windows(split, count, length)

    weights = load_decoder_weights(open_folder(trained))
    quantizer = Quantizer(
        weights, Asked(data.tokens, data.byte_lengths), ExportSettings(kv_dtype="int8"), 1.0001, tmp_path
    )
    quantizer.quantize("int4")
    quantizer.choose_cache()
    assert set(asked) == {"train", "val"}


def test_a_mix_that_loses_answers_is_not_the_one_chosen(trained, data, tmp_path):
    weights = load_decoder_weights(open_folder(trained))
    ids = data.windows("val", 1, 8)[0]
    # Sure of a token that no rounding of this decoder finds likely.
    log_p = torch.full((4, weights.spec.vocab_size), -30.0)
    log_p[:, 1] = 0.0
    by_text, by_both = (
        Quantizer(weights, data, ExportSettings(), 1.2, tmp_path, answers=answers).quantize("int4").record
        for answers in ((), (Answer(ids, log_p),))
    )
    assert by_both["bytes"] > by_text["bytes"]
    assert all(candidate["answers_lost"] for candidate in by_both["candidates"])
    assert "answers_lost" not in by_text["candidates"][0]


def test_a_bundle_scored_alone_has_the_scores_of_its_export(trained, artifacts, data):
    quality = artifacts["int4"].quality
    windows = quality_windows(data, "test", CONTEXT)[: quality.tokens // CONTEXT]
    found = evaluate_bundle(artifacts["int4"].path, artifacts["fp32"].path, windows, data.byte_lengths)
    # The export's reference is torch, this one onnxruntime: they agree to what float32 holds.
    assert (found.tokens, found.loss) == (quality.tokens, quality.loss)
    assert found.top1 == pytest.approx(quality.top1, abs=1e-3)
    assert found.bpb_ratio == pytest.approx(quality.bpb_ratio, rel=1e-5)
    assert found.kl == pytest.approx(quality.kl, rel=1e-3)


def test_temporary_graphs_leave_the_disk_once_they_are_loaded(trained, data, tmp_path):
    quantizer = Quantizer(load_decoder_weights(open_folder(trained)), data, ExportSettings(), 1.01, tmp_path)
    graphs = [quantizer.graph(quantizer.quantize(precision).matrices) for precision in ("int8", "int4")]
    assert list(tmp_path.iterdir()) == []
    ids = data.windows("val", 1, CONTEXT)[:, :-1]
    first, second = (graph.run(ids)[0] for graph in graphs)
    assert np.abs(first - second).max() > 0


@only("llama")
def test_a_chosen_artifact_is_byte_identical_when_built_again(trained, data, tmp_path, artifacts):
    options = ExportOptions(name="tiny", variant=trained.name, seed=3)
    [again] = export_variant(open_folder(trained), tmp_path, ["int4"], data, options=options)
    for path in sorted(p for p in again.path.rglob("*") if p.is_file()):
        first = artifacts["int4"].path / path.relative_to(again.path)
        assert first.read_bytes() == path.read_bytes(), path.name


@only("llama")
def test_an_artifact_beyond_the_limit_is_marked_and_not_raised(trained, data, tmp_path):
    [artifact] = export_variant(
        open_folder(trained), tmp_path, ["int8"], data, options=ExportOptions(max_bpb_ratio=0.5)
    )
    assert not artifact.passed
    assert artifact.reason == f"bits per byte {artifact.quality.bpb_ratio:.4f} of fp32's, limit 0.5000"


@pytest.mark.parametrize(("trained", "precision"), [("opt", "fp32"), ("llama", "int8-dyn+int8")], indirect=["trained"])
def test_an_int8_cache_is_scored_and_decodes(trained, data, tmp_path, precision):
    options = ExportOptions(settings=ExportSettings(kv_dtype="int8"))
    [artifact] = export_variant(open_folder(trained), tmp_path, [precision], data, options=options)
    assert artifact.passed
    assert artifact.quality.kl > 0
    bundle = load_bundle(artifact.path)
    assert (bundle.kv_dtype, bundle.onnxruntime_min) == ("int8", "1.27")
    assert bundle.manifest["quantization"]["kv_cache"]["method"] == "per-tensor"
    assert check_golden(OnnxruntimeEngine(bundle)) > 0


@only("opt")
def test_channels_of_a_cache_have_their_own_scales_where_one_is_far_larger(trained, data, tmp_path):
    model = load_model(trained)
    cfg = model.spec
    with torch.no_grad():
        for layer in model.layers:
            # One channel of the first values 100 times larger, and read 100 times smaller: the same function.
            channel = cfg.dim + cfg.num_kv_heads * cfg.head_dim
            layer.attn.qkv.weight[channel] *= 100
            if layer.attn.qkv.bias is not None:
                layer.attn.qkv.bias[channel] *= 100
            for head in range(cfg.num_heads // cfg.num_kv_heads):
                layer.attn.out.weight[:, head * cfg.head_dim] /= 100
    uneven = tmp_path / "uneven"
    save_checkpoint(
        uneven, spec=cfg, state=model.state_dict(), tokenizer_json=(trained / "tokenizer.json").read_bytes()
    )
    options = ExportOptions(settings=ExportSettings(kv_dtype="int8"))
    [artifact] = export_variant(open_folder(uneven), tmp_path / "artifacts", ["fp32"], data, options=options)
    record = load_bundle(artifact.path).manifest["quantization"]["kv_cache"]
    kl = {c["method"]: c["kl"] for c in record["candidates"]}
    assert record["method"] == "per-channel"
    assert kl["per-tensor"] > 10 * kl["per-channel"]
    assert check_golden(OnnxruntimeEngine(load_bundle(artifact.path))) > 0


def test_parity_stops_a_graph_whose_weights_are_not_the_checkpoints(trained, artifacts, data):
    model = load_model(trained)
    windows = data.windows("test", 4, model.spec.max_seq_len)
    assert check_parity(model, artifacts["fp32"].path, windows).max_difference > 0
    with torch.no_grad():
        # One weight of 6144, by a third of its size.
        model.layers[1].down.weight[0, 0] += 0.05
    with pytest.raises(QualityError, match="parity: logits of fp32 differ from torch by"):
        check_parity(model, artifacts["fp32"].path, windows)


def test_the_tolerance_comes_from_torchs_own_rounding(trained, artifacts, data):
    windows = data.windows("test", 4, CONFIGS["opt"].max_seq_len)
    _, error = reference_logits(load_model(trained), windows[:, :-1])
    parity = artifacts["fp32"].parity
    assert parity.tolerance == pytest.approx(16 * parity.torch_error)
    assert 0 < error < 1e-3
    assert parity.tokens_compared > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_golden_prompts_hold_in_a_new_session(artifacts, precision):
    bundle = load_bundle(artifacts[precision].path)
    assert bundle.golden
    assert all(margin > bundle.tolerance for golden in bundle.golden for margin in golden.margins)
    assert check_golden(OnnxruntimeEngine(bundle)) == sum(len(g.tokens) for g in bundle.golden)


def test_manifest_says_where_the_bundle_comes_from(trained, artifacts, data):
    bundle = load_bundle(artifacts["int8"].path)
    assert (bundle.name, bundle.variant, bundle.seed, bundle.precision) == ("tiny", trained.name, 3, "int8")
    provenance = bundle.manifest["provenance"]
    assert provenance["corpus_sha256"] == data.corpus_sha256
    assert len(provenance["checkpoint_sha256"]) == 64
    assert bundle.manifest["quality"] == json.loads(json.dumps(dataclasses.asdict(artifacts["int8"].quality)))
    assert {len(p) for p in bundle.prompts} == {bundle.model.context_length}
    card = (bundle.path / "README.md").read_text()
    assert f"{artifacts['int8'].quality.bpb:.4f} bits per byte" in card
    assert str(trained) not in "".join(p.read_text() for p in bundle.path.glob("*.json"))


def test_every_graph_reads_the_one_data_file(artifacts):
    for artifact in artifacts.values():
        bundle = load_bundle(artifact.path)
        assert {p.name for p in artifact.path.glob("*.data")} == {"model.onnx.data"}
        for name in set(bundle.graphs.values()):
            graph = onnx.load(artifact.path / name, load_external_data=False).graph
            locations = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
            assert locations == {"model.onnx.data"}
            assert (artifact.path / name).stat().st_size < 20_000


def test_the_final_bundle_is_the_artifact_and_its_record(artifacts, tmp_path):
    target = finish_bundle(artifacts["int4"].path, tmp_path / "bundle", {"ttft_ms": [1.5]})
    assert json.loads((target / "record.json").read_text()) == {"ttft_ms": [1.5]}
    load_bundle(target)
    (artifacts["int4"].path / "extra").mkdir()
    (target / "model.onnx.data").write_bytes(b"changed")
    with pytest.raises(BundleError):
        finish_bundle(target, tmp_path / "again", {})
    assert not (tmp_path / "again").exists()


def test_run_py_needs_nothing_of_the_project(artifacts, tmp_path):
    bundle = finish_bundle(artifacts["int8-dyn+int4"].path, tmp_path / "bundle", {})
    before = sorted(p.relative_to(bundle) for p in bundle.rglob("*"))
    program = f"""
import runpy, sys
sys.argv = ["run.py", "--verify"]
try:
    runpy.run_path({str(bundle / "run.py")!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
import ryot
assert ryot.__file__.startswith({str(bundle)!r}), ryot.__file__
heavy = {{"torch", "onnx", "ray", "click", "tabulate", "transformers", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, bundle / "run.py", "--prompt", "def ", "--max-new-tokens", "8"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert sorted(p.relative_to(bundle) for p in bundle.rglob("*")) == before


def test_the_runtime_has_what_edge_imports_and_no_more():
    modules = {path.as_posix() for path in runtime_modules()}
    assert {"ryot/__init__.py", "ryot/errors.py", "ryot/edge/__init__.py", "ryot/edge/session.py"} <= modules
    assert not [m for m in modules if m.split("/")[1] in ("train", "deploy", "cluster", "report", "cli", "optimize")]


def test_a_pair_is_as_good_as_its_worse_half(artifacts):
    a, b = artifacts["int8-dyn"].quality, artifacts["int4"].quality
    pair = worst(a, b)
    assert (pair.kl, pair.top1, pair.bpb) == (max(a.kl, b.kl), min(a.top1, b.top1), max(a.bpb, b.bpb))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnxruntime_genai_gives_the_golden_tokens(artifacts, precision):
    import onnxruntime_genai as genai

    bundle = load_bundle(artifacts[precision].path)
    if not bundle.one_session:
        # Its prefill is another graph, whose rounding the golden margins do not cover here.
        bundle = load_bundle(artifacts[precision.partition("+")[2]].path)
    model = genai.Model(str(bundle.path))
    for golden in bundle.golden:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=bundle.model.context_length, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(np.asarray(golden.ids, dtype=np.int32))
        tokens = []
        while len(tokens) < len(golden.tokens) and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        assert tokens == list(golden.tokens[: len(tokens)])
