"""Exports a checkpoint: one bundle folder for each precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ryot
from ryot.deploy import bundle
from ryot.deploy.blocks import OPSET
from ryot.deploy.datafile import DataFile
from ryot.deploy.forms import (
    QuantizeOptions,
    build_graphs,
    check_precision,
    graph_files,
    quantize_matrices,
    serialize,
    split_pair,
)
from ryot.deploy.weights import DecoderWeights, load_decoder_weights
from ryot.edge.bundle import DATA_NAME
from ryot.train.checkpoint import checkpoint_digest
from ryot.train.hf import END_OF_TEXT_ID

#: Oldest onnxruntime whose CPU kernels run these graphs.
ONNXRUNTIME_MIN = "1.24"
#: Held-out prompts of the context's length that a bundle carries, for measuring.
NUM_PROMPTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What a bundle says about itself, and how its weights are quantized."""

    name: str = "ryot"
    variant: str = ""
    seed: int = 0
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    corpus_sha256: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe, kept in the manifest."""


def export_form(
    checkpoint: Path,
    precision: str,
    target: Path,
    *,
    options: ExportOptions,
    prompts: NDArray[np.int64],
) -> Path:
    """Build the bundle of one precision at `target`; it appears whole or not at all.

    `prompts` are held-out token ids [n, context] for measuring.
    """
    check_precision(precision)
    weights = load_decoder_weights(checkpoint)
    with bundle.staged_folder(target) as stage:
        write_graphs(stage, weights, precision, options.quantize)
        bundle.copy_checkpoint_files(checkpoint, stage)
        bundle.write_requirements(stage, ONNXRUNTIME_MIN)
        bundle.write_genai_config(stage, weights.cfg, token_ids=_token_ids(), shared_buffer=True)
        bundle.copy_runtime(stage)
        bundle.write_manifest(stage, manifest_values(checkpoint, weights, precision, options, prompts))
    return target


def write_graphs(folder: Path, weights: DecoderWeights, precision: str, options: QuantizeOptions) -> None:
    """Write the graphs of a form and their data file."""
    matrices = {half: quantize_matrices(weights, half, options) for half in split_pair(precision)}
    with DataFile(folder / DATA_NAME) as data:
        for name, model in build_graphs(weights, precision, matrices, data).items():
            (folder / name).write_bytes(serialize(model))


def manifest_values(
    checkpoint: Path,
    weights: DecoderWeights,
    precision: str,
    options: ExportOptions,
    prompts: NDArray[np.int64],
) -> dict[str, Any]:
    """The manifest without its list of files."""
    return {
        "name": options.name,
        "variant": options.variant,
        "seed": options.seed,
        "precision": precision,
        "model": bundle.model_entry(weights.cfg),
        "graphs": graph_files(precision),
        "position_ids": weights.cfg.architecture == "opt",
        "kv_dtype": "float32",
        "eos_token_ids": [END_OF_TEXT_ID],
        "bos_token_id": END_OF_TEXT_ID,
        "opset": OPSET,
        "onnxruntime_min": ONNXRUNTIME_MIN,
        "golden": [],
        "tolerance": 0.0,
        "prompts": prompts[:NUM_PROMPTS].tolist(),
        "quantization": {},
        "quality": {},
        "provenance": {
            "checkpoint_sha256": checkpoint_digest(checkpoint),
            "corpus_sha256": options.corpus_sha256,
            "ryot_version": ryot.__version__,
            **{f"{name}_version": version(name) for name in ("torch", "onnx", "onnxruntime")},
        },
        "config": json.loads(json.dumps(dict(options.config))),
    }


def _token_ids() -> dict[str, int]:
    return {f"{name}_token_id": END_OF_TEXT_ID for name in ("bos", "eos", "pad")}
