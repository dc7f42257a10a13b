"""Builds one artifact: the bundle folder of a checkpoint at one precision, with what it says about itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import ryot
from ryot.deploy import bundle
from ryot.deploy.blocks import OPSET
from ryot.deploy.card import render_card
from ryot.deploy.datafile import DataFile
from ryot.deploy.golden import make_golden
from ryot.deploy.oracle import NO_ORACLE, OracleResult
from ryot.deploy.precisions import build_graphs, pair_matrices, serialize, split_pair
from ryot.deploy.quality import MAX_BPB_RATIO, Quality
from ryot.deploy.quantize import CacheFormat, Quantized
from ryot.deploy.runtime import copy_runtime
from ryot.deploy.sbom import SBOM_NAME, build_sbom
from ryot.deploy.settings import ExportSettings
from ryot.deploy.text_check import TextCheck
from ryot.deploy.verify import ParityResult
from ryot.deploy.weights import DecoderWeights
from ryot.edge.bundle import DATA_NAME, KVDtype, load_bundle
from ryot.mapping import to_mapping
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.spec import DecoderSpec

log = logging.getLogger(__name__)

#: Oldest onnxruntime that is supported, and the oldest whose attention reads an int8 cache: 1.24 refuses the graph, and
#: 1.25 and 1.26 load it and fail when it is run. Bundles were run with 1.24 to 1.32.
ONNXRUNTIME_MIN, ONNXRUNTIME_MIN_INT8_KV = "1.24", "1.27"
FLOAT_CACHE = CacheFormat()
#: Contexts up to here are measured full; a longer one is measured at the length that Phase 1's limits were set for.
MAX_FULL_PROMPT, LONG_CONTEXT_PROMPT = 512, 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What a bundle says about itself, and how its weights are quantized and judged."""

    name: str = "ryot"
    variant: str = ""
    seed: int = 0
    settings: ExportSettings = field(default_factory=ExportSettings)
    context: int | None = None
    """Tokens that prompt and answer may have together; None: as many as the checkpoint says."""
    oracle: bool = False
    """Whether the reading of the checkpoint is held against transformers, where that is installed."""
    max_bpb_ratio: float = MAX_BPB_RATIO
    """Bits per byte over those of fp32, above which an artifact is no candidate."""
    split: str = "test"
    """The split that quality is reported on."""
    config: Mapping[str, object] = field(default_factory=dict)
    """The resolved recipe, kept in the manifest."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What all artifacts of one checkpoint have in common."""

    checkpoint: Checkpoint
    weights: DecoderWeights
    options: ExportOptions
    text: TextCheck
    """Token ids, and what else was found out about its text."""
    corpus_sha256: str
    prompts: NDArray[np.int64]
    """Held-out token ids [n, length] that golden prompts and measurements are made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What was found out about an artifact before it is built; nothing of one that is not scored."""

    quality: Quality | None = None
    parity: ParityResult | None = None
    oracle: OracleResult = NO_ORACLE
    rounding_error: float = 0.0
    """What float32 alone may change in a logit."""


def onnxruntime_min(kv_dtype: KVDtype) -> str:
    """The oldest onnxruntime that runs graphs with such a cache."""
    return ONNXRUNTIME_MIN_INT8_KV if kv_dtype == "int8" else ONNXRUNTIME_MIN


def measured_prompt_tokens(spec: DecoderSpec) -> int:
    """Length of the prompts that a bundle carries, which is the length that it is measured at."""
    return spec.max_seq_len if spec.max_seq_len <= MAX_FULL_PROMPT else LONG_CONTEXT_PROMPT


def build_artifact(
    origin: Origin,
    target: Path,
    precision: str,
    singles: Mapping[str, Quantized],
    cache: CacheFormat,
    scores: Scores,
) -> Path:
    """Build the bundle of one precision at `target`; it appears whole or not at all.

    `singles` has the matrices of the precision, or of both halves of a pair.
    """
    weights, settings = origin.weights, origin.options.settings
    artifact = pair_matrices(weights, precision, {half: q.matrices for half, q in singles.items()})
    with bundle.staged_folder(target) as stage:
        with DataFile(stage / DATA_NAME) as data:
            graphs = build_graphs(
                weights,
                precision,
                artifact,
                data,
                kv_scales=cache.scales,
                prefill_attention=settings.prefill_attention,
            )
            for name, model in graphs.items():
                (stage / name).write_bytes(serialize(model))
        bundle.write_checkpoint_files(origin.checkpoint, stage)
        bundle.write_requirements(stage, onnxruntime_min(cache.dtype))
        bundle.write_genai_config(stage, weights.spec, origin.text.token_ids, shared_buffer=True)
        copy_runtime(stage)
        values = _manifest_values(origin, precision, singles, cache, scores)
        bundle.write_manifest(stage, values)
        golden, tolerance = make_golden(
            load_bundle(stage, verify=False), weights, artifact, origin.prompts, rounding_error=scores.rounding_error
        )
        (stage / "README.md").write_text(render_card(values), encoding="utf-8")
        bundle.write_json(stage / SBOM_NAME, build_sbom(stage, values))
        bundle.write_manifest(stage, {**values, "golden": golden, "tolerance": tolerance})
    log.info("%s: exported to %s", precision, target)
    return target


def _manifest_values(
    origin: Origin, precision: str, singles: Mapping[str, Quantized], cache: CacheFormat, scores: Scores
) -> dict[str, object]:
    """The manifest without its list of files and its golden prompts."""
    options, token_ids = origin.options, origin.text.token_ids
    return {
        "name": options.name,
        "variant": options.variant,
        "seed": options.seed,
        **bundle.graph_entries(
            origin.weights.spec,
            precision,
            cache.dtype,
            # All scores at once take so much memory per row, and rows together are no faster.
            prompt_by_row="+" in precision and options.settings.prefill_attention == "full",
        ),
        "eos_token_ids": list(token_ids.eos),
        "bos_token_id": token_ids.bos,
        "chat_template": origin.text.chat_template,
        "opset": OPSET,
        "onnxruntime_min": onnxruntime_min(cache.dtype),
        "golden": [],
        "tolerance": 0.0,
        "prompts": origin.prompts.tolist(),
        "quantization": {
            **to_mapping(options.settings, keep_none=True),
            "kv_cache": dict(cache.record),
            **{half: dict(singles[half].record) for half in split_pair(precision)},
        },
        "quality": {} if scores.quality is None else to_mapping(scores.quality, keep_none=True),
        "parity": {} if scores.parity is None else to_mapping(scores.parity, keep_none=True),
        "oracle": to_mapping(scores.oracle, keep_none=True),
        "provenance": {
            "source": origin.checkpoint.kind,
            "checkpoint_sha256": origin.checkpoint.sha256,
            "corpus_sha256": origin.corpus_sha256,
            "ryot_version": ryot.__version__,
            **{f"{name}_version": version(name) for name in ("torch", "onnx", "onnxruntime")},
        },
        "config": json.loads(json.dumps(dict(options.config))),
    }
