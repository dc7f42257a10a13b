"""The fused graphs against torch, and the bytes they share."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from ryot.config import PRECISIONS
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.datafile import DataFile
from ryot.deploy.export import export_unscored
from ryot.deploy.graph import build_graph, float_matrices
from ryot.deploy.precisions import serialize
from ryot.deploy.quantize import CacheFormat, observe_kv_scales
from ryot.deploy.settings import ExportSettings
from ryot.deploy.standard import StandardGraph
from ryot.deploy.weights import load_decoder_weights
from ryot.edge.bundle import DATA_NAME, load_bundle
from ryot.edge.capi import CApiEngine
from ryot.edge.session import OnnxruntimeEngine
from ryot.models.sources.folder import open_folder
from ryot.train.checkpoint import load_model

from .conftest import CONTEXT, VOCAB_SIZE

# Both sides sum at most a few hundred products of order 1 in float32, in different orders: each logit differs by some
# tens of rounding errors of 1.2e-7 times its size (below 10 here).
LOGIT_TOLERANCE = 5e-5


def empty_past(session: ort.InferenceSession, batch: int) -> dict[str, np.ndarray]:
    inputs = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
    return {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs}


def run_standard(session, ids, past, start):
    """Logits and the grown cache of the standard graph for new tokens `ids` at position `start`."""
    batch, length = ids.shape
    feed = {"input_ids": ids, "attention_mask": np.ones((batch, start + length), np.int64), **past}
    if any(i.name == "position_ids" for i in session.get_inputs()):
        feed["position_ids"] = np.tile(np.arange(start, start + length), (batch, 1))
    names = [o.name for o in session.get_outputs()]
    out = dict(zip(names, session.run(names, feed)))
    return out.pop("logits"), {name.replace("present", "past_key_values"): value for name, value in out.items()}


@pytest.fixture(scope="module")
def standard(checkpoint, tmp_path_factory):
    """The fp32 bundle of each architecture and its torch model."""
    target = tmp_path_factory.mktemp("fp32") / "bundle"
    export_unscored(
        open_folder(checkpoint), "fp32", target, options=ExportOptions(), prompts=np.zeros((1, CONTEXT), np.int64)
    )
    return target, load_model(checkpoint)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 30))


@pytest.mark.parametrize("cuts", [(30,), (29, 30), (1, 2, 3, 4, 5), (17, 18, 19, 20)])
def test_standard_graph_gives_torchs_logits_in_prefill_and_cached_decode(standard, ids, cuts):
    path, model = standard
    session = ort.InferenceSession(path / "model.onnx")
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).numpy()
    start, past = 0, empty_past(session, len(ids))
    for end in cuts:
        logits, past = run_standard(session, ids[:, start:end], past, start)
        np.testing.assert_allclose(logits, expected[:, start:end], atol=LOGIT_TOLERANCE, rtol=0)
        start = end


def test_a_prompt_may_come_in_pieces_for_one_row(standard, ids):
    path, model = standard
    session = ort.InferenceSession(path / "model.onnx")
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[:1])).numpy()
    start, past = 0, empty_past(session, 1)
    for end in (7, 20, 30):
        logits, past = run_standard(session, ids[:1, start:end], past, start)
        np.testing.assert_allclose(logits, expected[:, start:end], atol=LOGIT_TOLERANCE, rtol=0)
        start = end


def run_fast(checkpoint, folder, ids, prompt_length, *, attention, kv_scales=None):
    """Logits [B, S - prompt_length + 1, V] of the fast graph: of the prompt's last position, then one per step."""
    weights = load_decoder_weights(open_folder(checkpoint))
    folder.mkdir()
    with DataFile(folder / DATA_NAME) as data:
        model = build_graph("fast", weights, float_matrices(weights), data, kv_scales=kv_scales, attention=attention)
    (folder / "fast.onnx").write_bytes(serialize(model))
    session = ort.InferenceSession(folder / "fast.onnx")
    names = [o.name for o in session.get_outputs()]
    dtype = np.float32 if kv_scales is None else np.int8
    past = {name: value.astype(dtype) for name, value in empty_past(session, len(ids)).items()}
    logits, start = [], 0
    for end in range(prompt_length, ids.shape[1] + 1):
        feed = {"input_ids": ids[:, start:end], "total_sequence_length": np.array(end, np.int32), **past}
        feed["seqlens_k"] = np.full(len(ids), end - 1, np.int32)
        if any(i.name == "position_ids" for i in session.get_inputs()):
            feed["position_ids"] = np.tile(np.arange(start, end), (len(ids), 1))
        out = dict(zip(names, session.run(names, feed)))
        logits.append(out["logits"])
        past = {name: out[name.replace("past_key_values", "present")] for name in past}
        start = end
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("attention", ["flash", "full"])
@pytest.mark.parametrize("prompt_length", [1, 20])
def test_both_ways_to_attend_give_torchs_logits(standard, checkpoint, ids, tmp_path, attention, prompt_length):
    with torch.no_grad():
        expected = standard[1](torch.from_numpy(ids)).numpy()[:, prompt_length - 1 :]
    found = run_fast(checkpoint, tmp_path / "graph", ids, prompt_length, attention=attention)
    np.testing.assert_allclose(found, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_both_ways_to_attend_read_an_int8_cache_alike(standard, checkpoint, ids, tmp_path):
    exact = run_fast(checkpoint, tmp_path / "exact", ids, 20, attention="flash")
    observed = observe_kv_scales(StandardGraph(standard[0] / "model.onnx"), ids)
    for kv_scales in (observed, observed.per_tensor()):
        both = [
            run_fast(checkpoint, tmp_path / f"{a}-{kv_scales.per_channel}", ids, 20, attention=a, kv_scales=kv_scales)
            for a in ("flash", "full")
        ]
        # Rounding to 1 part in 127 is there to be seen, and small.
        error = np.abs(both[0] - exact).max()
        assert 10 * LOGIT_TOLERANCE < error < 0.2 * np.abs(exact).max()
        # The sums of the two differ in their last digits, so that now and then a key is rounded to the next code.
        assert np.abs(both[0] - both[1]).max() < 0.5 * error


def run_prompt(checkpoint, folder, ids, kind, **options):
    """Logits [B, V] of a prompt's last position, and the cache of CONTEXT positions that it leaves."""
    weights = load_decoder_weights(open_folder(checkpoint))
    folder.mkdir()
    with DataFile(folder / DATA_NAME) as data:
        model = build_graph(kind, weights, float_matrices(weights), data, **options)
    (folder / "graph.onnx").write_bytes(serialize(model))
    session = ort.InferenceSession(folder / "graph.onnx")
    batch, length = ids.shape
    dtypes = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
    past = {
        # Codes that no graph may take over: the past is empty.
        i.name: np.full((batch, i.shape[1], CONTEXT, i.shape[3]), 7, dtypes[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past_key_values")
    }
    feed = {"input_ids": ids, "total_sequence_length": np.array(length, np.int32), **past}
    feed["seqlens_k"] = np.full(batch, length - 1, np.int32)
    if any(i.name == "position_ids" for i in session.get_inputs()):
        feed["position_ids"] = np.tile(np.arange(length), (batch, 1))
    names = [o.name for o in session.get_outputs()]
    out = dict(zip(names, session.run(names, feed)))
    return out["logits"][:, 0], {name: value for name, value in out.items() if name.startswith("present")}


@pytest.mark.parametrize("attention", ["flash", "full"])
@pytest.mark.parametrize("length", [1, 20, CONTEXT])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_prompt_attends_in_float32_and_leaves_the_int8_cache_that_steps_read(
    standard, checkpoint, tmp_path, attention, length, per_channel
):
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, (3, length))
    observed = observe_kv_scales(StandardGraph(standard[0] / "model.onnx"), ids)
    kv_scales = observed if per_channel else observed.per_tensor()
    exact, _ = run_prompt(checkpoint, tmp_path / "float32", ids, "fast")
    _, expected = run_prompt(checkpoint, tmp_path / "int8", ids, "fast", kv_scales=kv_scales)
    logits, cache = run_prompt(
        checkpoint, tmp_path / "prompt", ids, "prefill", kv_scales=kv_scales, attention=attention
    )
    np.testing.assert_allclose(logits, exact, atol=LOGIT_TOLERANCE, rtol=0)
    for name, codes in cache.items():
        assert codes.dtype == np.int8 and codes.shape[2] == CONTEXT
        assert not codes[:, :, length:].any()
        # The first layer sees the same keys in both; behind it the operator has attended to rounded ones.
        off = np.abs(codes[:, :, :length].astype(int) - expected[name][:, :, :length])
        assert off.max() <= (1 if name.startswith("present.0.") else 6)
        assert np.abs(codes).max() >= 126


def export_int8_pair(standard, checkpoint, ids, folder, attention):
    """The bundle of a pair whose cache is int8."""
    observed = observe_kv_scales(StandardGraph(standard[0] / "model.onnx"), ids)
    path = export_unscored(
        open_folder(checkpoint),
        "int8-dyn+int8",
        folder / "pair",
        options=ExportOptions(settings=ExportSettings(kv_dtype="int8", prefill_attention=attention)),
        prompts=np.zeros((1, CONTEXT), np.int64),
        cache=CacheFormat(scales=observed, record={"method": "per-channel"}),
    )
    return load_bundle(path)


@pytest.mark.parametrize("attention", ["flash", "full"])
@pytest.mark.parametrize("max_len", [CONTEXT, 32])
def test_a_pair_with_an_int8_cache_decodes_alike_with_either_engine_and_buffer(
    standard, checkpoint, ids, tmp_path, attention, max_len
):
    bundle = export_int8_pair(standard, checkpoint, ids, tmp_path, attention)
    engines = [E(bundle, batch_size=len(ids), max_len=max_len) for E in (OnnxruntimeEngine, CApiEngine)]
    engines.append(OnnxruntimeEngine(bundle, batch_size=len(ids)))
    for prompts in (ids[:, :20], ids[:, 5:12]):
        for engine in engines:
            engine.prefill(prompts)
        for _ in range(8):
            for engine in engines[1:]:
                np.testing.assert_array_equal(engines[0].logits, engine.logits)
            for engine in engines:
                engine.step()


@pytest.mark.parametrize("engine", [OnnxruntimeEngine, CApiEngine])
@pytest.mark.parametrize("attention", ["flash", "full"])
def test_a_pair_with_an_int8_cache_takes_prompts_and_what_follows_in_pieces(
    standard, checkpoint, ids, tmp_path, attention, engine, monkeypatch
):
    bundle = export_int8_pair(standard, checkpoint, ids, tmp_path, attention)
    assert bundle.prefill_takes_past
    whole, extended, token_by_token = (
        engine(b, batch_size=2) for b in (bundle, bundle, bundle._replace(prefill_takes_past=False))
    )
    whole.prefill(ids[:2])
    monkeypatch.setattr("ryot.edge.engine.PIECE_TOKENS", 8)
    monkeypatch.setattr("ryot.edge.engine.FIRST_CAPACITY", 4)
    for pieces in (extended, token_by_token):
        pieces.prefill(ids[:2, :20])
        before = pieces.logits[0].copy()
        pieces.extend(ids[1, 20:], row=1)
        np.testing.assert_array_equal(pieces.logits[0], before)
    exact = standard[1](torch.from_numpy(ids[1:2]))[0, -1].detach().numpy()
    off_whole, off_pieces, off_tokens = (
        np.sqrt(np.square(e.logits[1] - exact).mean()) for e in (whole, extended, token_by_token)
    )
    # Pieces attend to rounded keys and values of those before, as steps do, and to their own in float32.
    assert 0 < off_pieces < 1.5 * max(off_whole, off_tokens)
    for _ in range(CONTEXT - ids.shape[1]):
        extended.step()


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-dyn+int8"])
@pytest.mark.parametrize("engine", [OnnxruntimeEngine, CApiEngine])
def test_a_prompt_in_pieces_is_as_good_as_one_whole(
    standard, checkpoint, ids, tmp_path, precision, engine, monkeypatch
):
    options = ExportOptions(settings=ExportSettings(prefill_attention="full"))
    prompts = np.zeros((1, CONTEXT), np.int64)
    bundle = load_bundle(
        export_unscored(open_folder(checkpoint), precision, tmp_path / "b", options=options, prompts=prompts)
    )
    whole = engine(bundle, batch_size=3)
    whole.prefill(ids)
    monkeypatch.setattr("ryot.edge.engine.PIECE_TOKENS", 16)
    pieces = engine(bundle, batch_size=3)
    pieces.prefill(ids)
    np.testing.assert_allclose(pieces.logits, whole.logits, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt_length", [1, 20])
def test_fast_graph_decodes_torchs_greedy_tokens(standard, ids, batch_size, prompt_length):
    path, model = standard
    decoder = OnnxruntimeEngine(load_bundle(path), batch_size=batch_size)
    decoder.prefill(ids[:batch_size, :prompt_length])
    text = torch.from_numpy(ids[:batch_size, :prompt_length])
    for _ in range(CONTEXT - prompt_length):
        with torch.no_grad():
            expected = model(text)[:, -1]
        np.testing.assert_allclose(decoder.logits, expected.numpy(), atol=LOGIT_TOLERANCE, rtol=0)
        text = torch.cat((text, expected.argmax(-1, keepdim=True)), dim=1)
        assert decoder.next_token.tolist() == text[:, -1].tolist()
        decoder.step()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_bytes_are_stored_once(checkpoint, precision, tmp_path):
    export_unscored(
        open_folder(checkpoint),
        precision,
        tmp_path / "b",
        options=ExportOptions(),
        prompts=np.zeros((1, CONTEXT), np.int64),
    )
    model = load_model(checkpoint)
    cfg = model.spec
    tables = cfg.vocab_size * cfg.dim * (1 if cfg.tie_embeddings else 2)
    inner = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers"))
    # Bytes a value of the matrices inside the layers and of the tables; a pair has one set of tables.
    inner_bytes, table_bytes = {
        "fp32": (4, 4),
        "int8-dyn": (1, 1),
        "int8": (1, 1),
        "int4": (0.5, 0.5),
        "int8-dyn+int8": (2, 1),
        "int8-dyn+int4": (1.5, 0.5),
    }[precision]
    expected = inner_bytes * inner + table_bytes * tables
    # Beyond the codes: scales (at most 4 bytes for 32 codes), norms and biases, rotary or position tables, alignment.
    allowance = 0.125 * expected + 40_000
    assert expected <= (tmp_path / "b" / DATA_NAME).stat().st_size <= expected + allowance


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bundle_built_twice_is_byte_identical(checkpoint, precision, tmp_path):
    for name in ("first", "second"):
        prompts = np.zeros((1, CONTEXT), np.int64)
        export_unscored(open_folder(checkpoint), precision, tmp_path / name, options=ExportOptions(), prompts=prompts)
    files = {p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "second") for p in (tmp_path / "second").rglob("*") if p.is_file()}
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_only_the_prefill_graph_of_a_pair_attends_with_all_scores_at_once(checkpoint, tmp_path):
    options = ExportOptions(settings=ExportSettings(prefill_attention="full"))
    for precision in ("int8-dyn", "int8-dyn+int8"):
        prompts = np.zeros((1, CONTEXT), np.int64)
        export_unscored(open_folder(checkpoint), precision, tmp_path / precision, options=options, prompts=prompts)
    graphs = sorted(tmp_path.rglob("*.onnx"))
    with_sink = [path.name for path in graphs if b"no_head_sink" in path.read_bytes()]
    assert len(graphs) == 5
    assert with_sink == ["prefill.onnx"]
    assert [load_bundle(tmp_path / p).prompt_by_row for p in ("int8-dyn", "int8-dyn+int8")] == [False, True]


def test_rows_of_a_prompt_that_attends_with_all_scores_at_once_are_computed_alone(checkpoint, ids, tmp_path):
    options = ExportOptions(settings=ExportSettings(prefill_attention="full"))
    prompts = np.zeros((1, CONTEXT), np.int64)
    bundle = load_bundle(
        export_unscored(open_folder(checkpoint), "int8-dyn+int8", tmp_path / "pair", options=options, prompts=prompts)
    )
    together, alone = OnnxruntimeEngine(bundle, batch_size=len(ids)), OnnxruntimeEngine(bundle)
    together.prefill(ids)
    for row, logits in zip(ids, together.logits):
        alone.prefill(row[None])
        np.testing.assert_array_equal(logits, alone.logits[0])
