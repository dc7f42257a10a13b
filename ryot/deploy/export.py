"""Exports a checkpoint: one bundle folder for each precision, each scored against fp32."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import ryot
from ryot.deploy import bundle
from ryot.deploy.artifacts import (
    build_graphs,
    check_precision,
    pair_matrices,
    serialize,
    split_pair,
)
from ryot.deploy.blocks import OPSET
from ryot.deploy.card import render_card
from ryot.deploy.datafile import DataFile
from ryot.deploy.golden import make_golden
from ryot.deploy.quality import (
    MAX_BPB_RATIO,
    REFERENCE,
    EvalData,
    Quality,
    divergence_at_depth,
    evaluate_artifacts,
    quality_windows,
    worst,
)
from ryot.deploy.quantize import CacheFormat, Quantized, Quantizer, quantize_rtn, smooth_for
from ryot.deploy.settings import ExportSettings
from ryot.deploy.standard import StandardGraph
from ryot.deploy.stored import BlockSource
from ryot.deploy.verify import PARITY_ROWS, PARITY_TOKENS, SAFETY, ParityResult, check_parity, reference_logits
from ryot.deploy.weights import DecoderWeights, load_decoder_weights
from ryot.edge.bundle import DATA_NAME, check_onnxruntime, load_bundle
from ryot.scratch import scratch_folder
from ryot.train.checkpoint import checkpoint_digest, load_model
from ryot.train.hf import END_OF_TEXT_ID

log = logging.getLogger(__name__)

#: Oldest onnxruntime that is supported, and the oldest whose attention reads an int8 cache: 1.24 refuses the graph, and
#: 1.25 and 1.26 load it and fail when it is run. Bundles were run with 1.24 to 1.32.
ONNXRUNTIME_MIN, ONNXRUNTIME_MIN_INT8_KV = "1.24", "1.27"
FLOAT_CACHE = CacheFormat()
#: Held-out prompts of the context's length that a bundle carries, for measuring.
NUM_PROMPTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What a bundle says about itself, and how its weights are quantized and judged."""

    name: str = "ryot"
    variant: str = ""
    seed: int = 0
    settings: ExportSettings = field(default_factory=ExportSettings)
    max_bpb_ratio: float = MAX_BPB_RATIO
    """Bits per byte over those of fp32, above which an artifact is no candidate."""
    split: str = "test"
    """The split that quality is reported on."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe, kept in the manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactResult:
    """One exported artifact and the judgement on its quality."""

    precision: str
    path: Path
    size_bytes: int
    """Of all the bundle's files."""
    parity: ParityResult
    """Of the fp32 graphs that the artifact was quantized from."""
    quality: Quality
    passed: bool
    reason: str
    """Why it did not pass; empty if it did."""


def export_variant(
    checkpoint: Path,
    out_root: Path,
    precisions: Sequence[str],
    data: EvalData,
    *,
    options: ExportOptions,
    source: BlockSource | None = None,
    on_artifact: Callable[[ArtifactResult], None] = lambda _: None,
) -> list[ArtifactResult]:
    """Export a checkpoint in every precision to `out_root/PRECISION`, gate and score each.

    The fp32 graphs are checked against torch first, also where `fp32` is not asked for; all artifacts are then scored
    against torch on one pass over held-out text. Raises `QualityError` when parity fails and nothing can be trusted;
    one that is merely worse than the limit comes back with `passed` false. A `source` that holds matrices in 4 bits
    gives them to `int4` as they are.
    """
    for precision in precisions:
        check_precision(precision)
    check_onnxruntime(ort.__version__, onnxruntime_min(options.settings))
    weights = load_decoder_weights(checkpoint)
    context = weights.cfg.max_seq_len
    parity_windows = data.windows(options.split, PARITY_ROWS, min(context, PARITY_TOKENS))[:, :-1]
    halves = dict.fromkeys(half for precision in precisions for half in split_pair(precision))
    # Blocks that the source has rounded hold for its own values alone.
    if any(half != "fp32" for half in halves) and not (source and "int4" in halves):
        weights = smooth_for(weights, data)
    prompts = data.windows("val", NUM_PROMPTS, context)[:, :context]
    identity = _Identity(checkpoint, weights, options, data.corpus_sha256, prompts)
    with scratch_folder("export") as scratch:
        quantizer = Quantizer(weights, data, options.settings, options.max_bpb_ratio, scratch, source=source)
        singles = {"fp32": quantizer.quantize("fp32")}
        parity = check_parity(
            load_model(checkpoint),
            _export(identity, scratch / "fp32", "fp32", singles, FLOAT_CACHE, None, 0.0),
            parity_windows,
        )
        singles |= {half: quantizer.quantize(half) for half in halves if half not in singles}
        cache = quantizer.choose_cache()
        qualities = _score(quantizer, precisions, singles, cache, data, options)
    results = []
    for precision in precisions:
        quality = qualities[precision]
        path = _export(identity, out_root / precision, precision, singles, cache, quality, parity.tolerance)
        results.append(_judge(precision, path, parity, quality, options.max_bpb_ratio))
        on_artifact(results[-1])
    return results


def _score(
    quantizer: Quantizer,
    precisions: Sequence[str],
    singles: Mapping[str, Quantized],
    cache: CacheFormat,
    data: EvalData,
    options: ExportOptions,
) -> dict[str, Quality]:
    """The quality of each precision; of a pair, in each figure the worse of its two graphs.

    An int8 cache is read at every position here, as steps do. A pair's prompt reads none: it has less error than this.
    """
    graphs: dict[str, StandardGraph] = {}
    for precision in precisions:
        artifact = quantizer.artifact(precision, singles)
        graphs[precision] = quantizer.graph(artifact.decode, cache.scales)
        if artifact.is_pair:
            graphs[f"{precision} prefill"] = quantizer.graph(artifact.prefill, cache.scales)
    if cache.scales is None:
        graphs.pop("fp32", None)  # parity holds it against the reference
    context = quantizer.context
    windows = quality_windows(data, options.split, context)
    found = evaluate_artifacts(
        quantizer.reference, graphs, windows, data.byte_lengths, max_bpb_ratio=options.max_bpb_ratio
    )
    depth, kl = divergence_at_depth(quantizer.reference, graphs, data, options.split, context)
    found |= {name: dataclasses.replace(found[name], depth=depth, depth_kl=kl[name]) for name in kl}
    found.setdefault("fp32", found[REFERENCE])
    return {p: worst(found[p], found.get(f"{p} prefill", found[p])) for p in precisions}


def export_form(
    checkpoint: Path,
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
    check_onnxruntime(ort.__version__, onnxruntime_min(options.settings))
    weights = load_decoder_weights(checkpoint)
    singles = {half: quantize_rtn(weights, half, options.settings) for half in split_pair(precision)}
    _, torch_error = reference_logits(load_model(checkpoint), prompts[:1])
    identity = _Identity(checkpoint, weights, options, corpus_sha256, prompts)
    return _export(identity, target, precision, singles, cache, None, SAFETY * torch_error)


def onnxruntime_min(settings: ExportSettings) -> str:
    """The oldest onnxruntime that runs graphs of these options."""
    return ONNXRUNTIME_MIN_INT8_KV if settings.kv_dtype == "int8" else ONNXRUNTIME_MIN


@dataclass(frozen=True, slots=True)
class _Identity:
    """What all artifacts of one checkpoint have in common."""

    checkpoint: Path
    weights: DecoderWeights
    options: ExportOptions
    corpus_sha256: str
    prompts: NDArray[np.int64]


def _judge(precision: str, path: Path, parity: ParityResult, quality: Quality, limit: float) -> ArtifactResult:
    passed = quality.bpb_ratio <= limit
    return ArtifactResult(
        precision=precision,
        path=path,
        size_bytes=load_bundle(path, verify=False).size_bytes,
        parity=parity,
        quality=quality,
        passed=passed,
        reason="" if passed else f"bits per byte {quality.bpb_ratio:.4f} of fp32's, limit {limit:.4f}",
    )


def _export(
    identity: _Identity,
    target: Path,
    precision: str,
    singles: Mapping[str, Quantized],
    cache: CacheFormat,
    quality: Quality | None,
    rounding_error: float,
) -> Path:
    weights = identity.weights
    form = pair_matrices(weights, precision, {half: q.matrices for half, q in singles.items()})
    with bundle.staged_folder(target) as stage:
        with DataFile(stage / DATA_NAME) as data:
            graphs = build_graphs(
                weights,
                precision,
                form,
                data,
                kv_scales=cache.scales,
                prefill_attention=identity.options.settings.prefill_attention,
            )
            for name, model in graphs.items():
                (stage / name).write_bytes(serialize(model))
        bundle.copy_checkpoint_files(identity.checkpoint, stage)
        bundle.write_requirements(stage, onnxruntime_min(identity.options.settings))
        bundle.write_genai_config(stage, weights.cfg, token_ids=_token_ids(), shared_buffer=True)
        bundle.copy_runtime(stage)
        values = _manifest_values(identity, precision, singles, cache, quality)
        bundle.write_manifest(stage, values)
        golden, tolerance = make_golden(
            load_bundle(stage, verify=False),
            weights,
            form,
            identity.prompts,
            rounding_error=rounding_error,
        )
        (stage / "README.md").write_text(render_card(values), encoding="utf-8")
        bundle.write_manifest(stage, {**values, "golden": golden, "tolerance": tolerance})
    log.info("%s: exported to %s", precision, target)
    return target


def _manifest_values(
    identity: _Identity,
    precision: str,
    singles: Mapping[str, Quantized],
    cache: CacheFormat,
    quality: Quality | None,
) -> dict[str, Any]:
    """The manifest without its list of files and its golden prompts."""
    options, cfg = identity.options, identity.weights.cfg
    return {
        "name": options.name,
        "variant": options.variant,
        "seed": options.seed,
        **bundle.graph_entries(
            cfg,
            precision,
            cache.dtype,
            # All scores at once take so much memory a row, and rows together are no faster.
            prompt_by_row="+" in precision and options.settings.prefill_attention == "full",
        ),
        "eos_token_ids": [END_OF_TEXT_ID],
        "bos_token_id": END_OF_TEXT_ID,
        "opset": OPSET,
        "onnxruntime_min": onnxruntime_min(options.settings),
        "golden": [],
        "tolerance": 0.0,
        "prompts": identity.prompts[:NUM_PROMPTS].tolist(),
        "quantization": {
            **dataclasses.asdict(options.settings),
            "kv_cache": dict(cache.record),
            **{half: dict(singles[half].record) for half in split_pair(precision)},
        },
        "quality": {} if quality is None else quality.as_dict(),
        "provenance": {
            "checkpoint_sha256": checkpoint_digest(identity.checkpoint),
            "corpus_sha256": identity.corpus_sha256,
            "ryot_version": ryot.__version__,
            **{f"{name}_version": version(name) for name in ("torch", "onnx", "onnxruntime")},
        },
        "config": json.loads(json.dumps(dict(options.config))),
    }


def _token_ids() -> dict[str, int]:
    return {f"{name}_token_id": END_OF_TEXT_ID for name in ("bos", "eos", "pad")}
