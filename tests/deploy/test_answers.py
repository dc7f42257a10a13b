"""Answers in the chat template: what counts as lost, and a cache that only they show to be too coarse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ryot.deploy.answers import ANSWER_TOKENS, AnswerLoss, answer_greedily, chat_prompts, judge_answers
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_variant
from ryot.deploy.quantize import quantize_rtn
from ryot.deploy.scorer import TorchScorer
from ryot.deploy.settings import ExportSettings
from ryot.deploy.standard import write_standard_graph
from ryot.deploy.weights import DecoderWeights, load_decoder_weights
from ryot.edge.bundle import load_bundle
from ryot.models.sources.folder import open_folder
from ryot.train.checkpoint import save_checkpoint

from .conftest import CONFIGS, CONTEXT, random_decoder

#: Before every question; of its four tokens, a byte each, most are in no other text.
MARK = "\U0001f600"
TEMPLATE = MARK + "{{ messages[0].content }}\n"


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory, tokenizer, data):
    """A decoder that is sure of its tokens, and in which the mark's values are far larger than any in the text."""
    spec = dataclasses.replace(CONFIGS["llama"], tie_embeddings=False)
    state = random_decoder(spec).state_dict()
    mark = [i for i in tokenizer.encode(MARK).ids if i not in data.tokens]
    assert len(mark) >= 2
    state["embedding.weight"][:, 0] = 0
    state["embedding.weight"][mark] = 0
    state["embedding.weight"][mark, 0] = 8
    for i in range(spec.num_layers):
        state[f"layers.{i}.attn.qkv.weight"][spec.q_dim + spec.kv_dim :, 0] *= 40
    state["head.weight"] *= 8
    path = tmp_path_factory.mktemp("chat") / "checkpoint"
    save_checkpoint(path, spec=spec, state=state, tokenizer_json=tokenizer.to_str().encode())
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def weights(chat_checkpoint):
    return load_decoder_weights(open_folder(chat_checkpoint))


@pytest.fixture(scope="module")
def answers(chat_checkpoint, weights):
    return answer_greedily(TorchScorer(weights), chat_prompts(chat_checkpoint, CONTEXT - ANSWER_TOKENS), eos=())


def test_rounded_weights_keep_the_answers_and_another_decoder_loses_them(weights, answers, tmp_path):
    tokens = ANSWER_TOKENS * len(answers)
    assert tokens >= 3 * ANSWER_TOKENS
    assert judge_answers(answers, TorchScorer(weights)) == AnswerLoss(tokens=tokens)
    graph = write_standard_graph(tmp_path, weights, quantize_rtn(weights, "int8", ExportSettings()).matrices)
    rounded = judge_answers(answers, graph)
    assert rounded.lost == 0 < rounded.kl < 0.1
    other = random_decoder(weights.spec, seed=1).state_dict()
    stranger = judge_answers(
        answers, TorchScorer(DecoderWeights(spec=weights.spec, arrays={n: t.numpy() for n, t in other.items()}))
    )
    assert stranger.lost > tokens / 4
    assert stranger.reason(1e9).startswith(f"{stranger.lost} of {tokens} tokens")


def test_a_token_with_a_rival_nearly_as_likely_is_not_lost(weights, answers):
    token = int(answers[0].log_p_AV[0].argmax())
    head = weights["head.weight"].copy()
    head[token - 1] = head[token] * np.float32(0.999)
    swapped = head.copy()
    swapped[[token - 1, token]] = head[[token, token - 1]]
    pair = [DecoderWeights(spec=weights.spec, arrays={**weights.arrays, "head.weight": h}) for h in (head, swapped)]
    said = answer_greedily(TorchScorer(pair[0]), [answers[0].ids_T[: -ANSWER_TOKENS + 1].tolist()], eos=())
    logits = TorchScorer(pair[1]).run(said[0].ids_T[None])[0][0, -ANSWER_TOKENS:]
    assert (logits.argmax(-1) != said[0].log_p_AV.argmax(-1).numpy()).any()
    assert judge_answers(said, TorchScorer(pair[1])).lost == 0


def test_a_cache_that_turns_answers_alone_stays_in_float32(chat_checkpoint, data, tmp_path, caplog):
    options = ExportOptions(settings=ExportSettings(kv_dtype="int8"))
    [artifact] = export_variant(open_folder(chat_checkpoint), tmp_path, ["fp32"], data, options=options)
    bundle = load_bundle(artifact.path)
    record = bundle.manifest["quantization"]["kv_cache"]
    # On held-out text, which has no mark in it, nothing is wrong.
    assert all(c["bpb_ratio"] < 1.01 and c["answers_lost"] > 0 for c in record["candidates"])
    assert (record["method"], bundle.kv_dtype, bundle.onnxruntime_min) == ("float32", "float32", "1.24")
    assert f"an int8 cache is not used, keys and values stay in float32: {record['reason']}" in caplog.text
    assert artifact.passed
    assert (artifact.quality.answers_lost, artifact.quality.answer_tokens) == (0, 0)
