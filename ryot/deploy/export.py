"""Exports a checkpoint: one bundle folder per precision, each scored against float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ryot.deploy import bundle
from ryot.deploy.answers import ANSWER_TOKENS, Answer, AnswerLoss, answer_greedily, chat_prompts, judge_answers
from ryot.deploy.artifact import (
    FLOAT_CACHE,
    ExportOptions,
    Origin,
    Scores,
    build_artifact,
    measured_prompt_tokens,
    onnxruntime_min,
)
from ryot.deploy.mapped import map_weights, release_behind
from ryot.deploy.memory import give_back_memory
from ryot.deploy.oracle import OracleAnswer, OracleResult, ask_oracle, check_oracle
from ryot.deploy.precisions import STANDARD_GRAPH, check_precision, split_pair
from ryot.deploy.quality import (
    REFERENCE,
    EvalData,
    Quality,
    Scorer,
    divergence_at_depth,
    evaluate_artifacts,
    quality_windows,
    worst,
)
from ryot.deploy.quantize import CacheFormat, Quantized, Quantizer, quantize_rtn, smooth_for
from ryot.deploy.scorer import TorchScorer
from ryot.deploy.standard import StandardGraph
from ryot.deploy.stored import CheckpointBlocks, stored_in_four_bits
from ryot.deploy.text_check import check_text
from ryot.deploy.verify import SAFETY, ParityResult, check_parity, parity_size, reference_logits
from ryot.deploy.weights import load_decoder_weights
from ryot.edge.bundle import DATA_NAME, check_onnxruntime, load_bundle
from ryot.edge.memory import map_large_arrays
from ryot.models.sources.checkpoint import Checkpoint
from ryot.scratch import scratch_folder
from ryot.train.checkpoint import build_decoder
from ryot.train.heap import frozen_heap

#: Held-out prompts that a bundle carries, for measuring.
NUM_PROMPTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactResult:
    """One exported artifact and the judgement on its quality."""

    precision: str
    path: Path
    size_bytes: int
    """Of all the bundle's files."""
    parity: ParityResult
    """Of the fp32 graphs that the artifact was quantized from."""
    oracle: OracleResult
    """What else the reading of the checkpoint was held against."""
    quality: Quality
    passed: bool
    reason: str
    """Why it did not pass; empty if it did."""


def export_variant(
    checkpoint: Checkpoint,
    out_root: Path,
    precisions: Sequence[str],
    data: EvalData,
    *,
    options: ExportOptions,
    on_artifact: Callable[[ArtifactResult], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[ArtifactResult]:
    """Export a checkpoint in every precision to `out_root/PRECISION`, gate and score each.

    The tokenizer is tried first. The fp32 graphs are checked against torch, also where `fp32` is not asked for, and the
    checkpoint against transformers where `options` say so; all artifacts are scored against float32 on one pass over
    the held-out text. Raises `QualityError` when parity fails and nothing can be trusted; an artifact that is merely
    worse than the limit comes back with `passed` false. `tell` hears of each stage.

    The weights are in memory until they stand in the float32 bundle that parity is checked on, in a temporary folder;
    from then on they are read from there.
    """
    for precision in precisions:
        check_precision(precision)
    check_onnxruntime(ort.__version__, onnxruntime_min(options.settings.kv_dtype))
    map_large_arrays()
    give_back_memory()  # of what was tuned before
    with frozen_heap():
        return _export_all(checkpoint, out_root, precisions, data, options, on_artifact, tell)


def _export_all(
    checkpoint: Checkpoint,
    out_root: Path,
    precisions: Sequence[str],
    data: EvalData,
    options: ExportOptions,
    on_artifact: Callable[[ArtifactResult], None],
    tell: Callable[[str], None],
) -> list[ArtifactResult]:
    with scratch_folder("export") as scratch:
        files = scratch / "files"
        files.mkdir()
        bundle.write_checkpoint_files(checkpoint, files)
        weights = load_decoder_weights(checkpoint, options.context)
        text = check_text(files, vocab_size=weights.spec.vocab_size)
        prompts = data.windows("val", NUM_PROMPTS, measured_prompt_tokens(weights.spec))[:, :-1]
        origin = Origin(checkpoint, weights, options, text, data.corpus_sha256, prompts)
        rows, tokens = parity_size(weights.spec)
        windows = data.windows(options.split, rows, tokens)[:, :-1]
        # Asked before the float32 graphs lie on the disk: of two copies of the weights in float32 one is gone by then.
        answer = OracleAnswer(reason="not asked")
        if options.oracle:
            tell("asking transformers what it computes")
            answer = ask_oracle(checkpoint, windows, scratch)
        tell("checking the float32 graphs against torch")
        origin, fp32 = _write_float32(origin, scratch / "fp32")
        del weights
        give_back_memory()
        model = build_decoder(origin.weights.spec, origin.weights.arrays)
        release_behind(model, origin.weights.arrays)
        parity = check_parity(model, fp32, windows)
        oracle = check_oracle(answer, checkpoint, model, windows, parity.tolerance, scratch)
        give_back_memory()
        stored = stored_in_four_bits(checkpoint, origin.weights.spec)
        reference = TorchScorer(origin.weights)
        questions = chat_prompts(files, origin.weights.spec.max_seq_len - ANSWER_TOKENS)
        answers = answer_greedily(reference, questions, text.token_ids.eos)
        quantized = _quantize(origin, stored, precisions, data, reference, answers, scratch, tell)
        give_back_memory()
        cache = quantized[precisions[0]].quantizer.choose_cache()
        tell(f"scoring {', '.join(precisions)}")
        qualities = _score(quantized, cache, answers, data, options)
        give_back_memory()
    results = []
    for precision, way in quantized.items():
        tell(f"writing {precision}")
        scores = Scores(quality=qualities[precision], rounding_error=parity.tolerance, parity=parity, oracle=oracle)
        path = build_artifact(way.origin, out_root / precision, precision, way.singles, cache, scores)
        results.append(_judge(precision, path, scores, options.max_bpb_ratio))
        on_artifact(results[-1])
    return results


def _write_float32(origin: Origin, target: Path) -> tuple[Origin, Path]:
    """The float32 bundle without golden prompts, and the origin with its weights as they lie there."""
    weights = origin.weights
    plain = {"fp32": quantize_rtn(weights, "fp32", origin.options.settings)}
    unproven = dataclasses.replace(origin, prompts=origin.prompts[:0])
    path = build_artifact(unproven, target, "fp32", plain, FLOAT_CACHE, Scores())
    mapped = map_weights(weights, path / STANDARD_GRAPH, path / DATA_NAME)
    return dataclasses.replace(origin, weights=mapped), path


@dataclass(frozen=True, slots=True)
class _Way:
    """Weights that some of the precisions are made from, and what was made of them."""

    origin: Origin
    quantizer: Quantizer
    singles: dict[str, Quantized]


def _as_it_is(precision: str, stored: CheckpointBlocks | None) -> bool:
    """Whether a precision holds the checkpoint's own values: in float32, or in the blocks that it has them in."""
    return precision == "fp32" or (stored is not None and "int4" in split_pair(precision))


def _quantize(
    origin: Origin,
    stored: CheckpointBlocks | None,
    precisions: Sequence[str],
    data: EvalData,
    reference: Scorer,
    answers: Sequence[Answer],
    scratch: Path,
    tell: Callable[[str], None],
) -> dict[str, _Way]:
    """The matrices of every precision, by precision.

    Those that hold the checkpoint's own values are made of the origin's weights, the others of the same smoothed for
    rounded inputs. All are held against `reference`, the origin's float32 decoder, and its answers.
    """
    options, weights = origin.options, origin.weights
    make = partial(
        Quantizer,
        data=data,
        settings=options.settings,
        max_bpb_ratio=options.max_bpb_ratio,
        scratch=scratch,
        reference=reference,
        answers=answers,
    )
    first = _Way(origin, make(weights, source=stored), {})
    second: _Way | None = None
    ways: dict[str, _Way] = {}
    for precision in precisions:
        if _as_it_is(precision, stored):
            ways[precision] = first
            continue
        if second is None:
            tell("smoothing the inputs of matrices")
            even = smooth_for(weights, data)
            second = _Way(dataclasses.replace(origin, weights=even), make(even), {})
        ways[precision] = second
    for precision, way in ways.items():
        for half in split_pair(precision):
            if half not in way.singles:
                tell(f"quantizing to {half}")
                way.singles[half] = way.quantizer.quantize(half)
    return ways


def _score(
    quantized: Mapping[str, _Way],
    cache: CacheFormat,
    answers: Sequence[Answer],
    data: EvalData,
    options: ExportOptions,
) -> dict[str, Quality]:
    """The quality of each precision; of a pair, in each figure the worse of its two graphs.

    An int8 cache is read at every position here, as steps do. A pair's prompt reads none: it has less error than this.
    """
    graphs: dict[str, StandardGraph] = {}
    for precision, way in quantized.items():
        artifact = way.quantizer.artifact(precision, way.singles)
        if precision != "fp32" or cache.scales is not None:  # parity holds fp32 against the reference
            graphs[precision] = way.quantizer.graph(artifact.decode, cache.scales)
        if artifact.is_pair:
            graphs[f"{precision} prefill"] = way.quantizer.graph(artifact.prefill, cache.scales)
    quantizer = next(iter(quantized.values())).quantizer
    windows = quality_windows(data, options.split, quantizer.context)
    found = evaluate_artifacts(
        quantizer.reference, graphs, windows, data.byte_lengths, max_bpb_ratio=options.max_bpb_ratio
    )
    depth, kl = divergence_at_depth(quantizer.reference, graphs, data, options.split, quantizer.context)
    found |= {name: dataclasses.replace(found[name], depth=depth, depth_kl=kl[name]) for name in kl}
    for name, graph in graphs.items():
        said = judge_answers(answers, graph)
        found[name] = dataclasses.replace(
            found[name], answer_tokens=said.tokens, answer_kl=said.kl, answers_lost=said.lost
        )
    found.setdefault("fp32", found[REFERENCE])
    return {p: worst(found[p], found.get(f"{p} prefill", found[p])) for p in quantized}


def export_unscored(
    checkpoint: Checkpoint,
    precision: str,
    target: Path,
    *,
    options: ExportOptions,
    prompts: NDArray[np.int64],
    corpus_sha256: str = "",
    cache: CacheFormat = FLOAT_CACHE,
) -> Path:
    """Build the bundle of one precision at `target`, by RTN and not scored; it appears whole or not at all.

    `prompts` are held-out token ids [n, context] that golden prompts and measurements are made from. `cache` has the
    type that `options` name.
    """
    assert cache.dtype == options.settings.kv_dtype
    check_precision(precision)
    check_onnxruntime(ort.__version__, onnxruntime_min(options.settings.kv_dtype))
    weights = load_decoder_weights(checkpoint, options.context)
    with scratch_folder("export") as files:
        bundle.write_checkpoint_files(checkpoint, files)
        text = check_text(files, vocab_size=weights.spec.vocab_size)
    singles = {half: quantize_rtn(weights, half, options.settings) for half in split_pair(precision)}
    _, tokens = parity_size(weights.spec)
    _, torch_error = reference_logits(build_decoder(weights.spec, weights.arrays), prompts[:1, :tokens])
    origin = Origin(checkpoint, weights, options, text, corpus_sha256, prompts)
    return build_artifact(origin, target, precision, singles, cache, Scores(rounding_error=SAFETY * torch_error))


def _judge(precision: str, path: Path, scores: Scores, limit: float) -> ArtifactResult:
    assert scores.quality is not None and scores.parity is not None
    reason = _breach(scores.quality, limit)
    return ArtifactResult(
        precision=precision,
        path=path,
        size_bytes=load_bundle(path, verify=False).size_bytes,
        parity=scores.parity,
        oracle=scores.oracle,
        quality=scores.quality,
        passed=not reason,
        reason=reason,
    )


def _breach(quality: Quality, limit: float) -> str:
    """What of an artifact is beyond the limit of bits per byte over fp32's; empty if nothing is."""
    if not quality.bpb_ratio <= limit:
        return f"bits per byte {quality.bpb_ratio:.4f} of fp32's, limit {limit:.4f}"
    said = AnswerLoss(tokens=quality.answer_tokens, kl=quality.answer_kl, lost=quality.answers_lost)
    # KL is what the loss grows by on text that float32 writes, so the same share of the loss is the limit there.
    return said.reason((limit - 1) * quality.loss / quality.bpb_ratio)
