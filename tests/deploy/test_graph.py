"""The fused graphs against torch, and the bytes they share."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from ryot.config import PRECISIONS
from ryot.deploy.export import ExportOptions, export_form
from ryot.edge.bundle import DATA_NAME, load_bundle
from ryot.edge.session import Decoder
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
def form(checkpoint, tmp_path_factory):
    """The fp32 bundle of each architecture and its torch model."""
    target = tmp_path_factory.mktemp("fp32") / "bundle"
    export_form(checkpoint, "fp32", target, options=ExportOptions(), prompts=np.zeros((1, CONTEXT), np.int64))
    return target, load_model(checkpoint)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 30))


@pytest.mark.parametrize("cuts", [(30,), (29, 30), (1, 2, 3, 4, 5), (17, 18, 19, 20)])
def test_standard_graph_gives_torchs_logits_in_prefill_and_cached_decode(form, ids, cuts):
    path, model = form
    session = ort.InferenceSession(path / "model.onnx")
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).numpy()
    start, past = 0, empty_past(session, len(ids))
    for end in cuts:
        logits, past = run_standard(session, ids[:, start:end], past, start)
        np.testing.assert_allclose(logits, expected[:, start:end], atol=LOGIT_TOLERANCE, rtol=0)
        start = end


def test_a_prompt_may_come_in_pieces_for_one_row(form, ids):
    path, model = form
    session = ort.InferenceSession(path / "model.onnx")
    with torch.no_grad():
        expected = model(torch.from_numpy(ids[:1])).numpy()
    start, past = 0, empty_past(session, 1)
    for end in (7, 20, 30):
        logits, past = run_standard(session, ids[:1, start:end], past, start)
        np.testing.assert_allclose(logits, expected[:, start:end], atol=LOGIT_TOLERANCE, rtol=0)
        start = end


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt_length", [1, 20])
def test_fast_graph_decodes_torchs_greedy_tokens(form, ids, batch_size, prompt_length):
    path, model = form
    decoder = Decoder(load_bundle(path), batch_size=batch_size)
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
    export_form(
        checkpoint, precision, tmp_path / "b", options=ExportOptions(), prompts=np.zeros((1, CONTEXT), np.int64)
    )
    model = load_model(checkpoint)
    cfg = model.cfg
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
        export_form(checkpoint, precision, tmp_path / name, options=ExportOptions(), prompts=prompts)
    files = {p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "second") for p in (tmp_path / "second").rglob("*") if p.is_file()}
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
