"""A teacher for distillation: its graph in onnxruntime on the worker that trains the student."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ryot.config import VariantConfig, digest
from ryot.deploy.quantize import quantize_rtn
from ryot.deploy.settings import ExportSettings
from ryot.deploy.standard import write_standard_graph
from ryot.deploy.weights import load_decoder_weights
from ryot.errors import CheckpointError
from ryot.models.sources.checkpoint import Checkpoint
from ryot.scratch import scratch_folder
from ryot.train.initial import open_unchanged
from ryot.train.source_text import SourceText, read_source_text
from ryot.train.teaching import Score, Teacher

log = logging.getLogger(__name__)


def open_teacher(variant: VariantConfig, cache_dir: Path) -> Teacher | None:
    """The teacher of a recipe; None for one that has none. Its graph is built when something is not in the cache.

    Raises `CheckpointError` when it has changed since the recipe was resolved.
    """
    config = variant.distill
    if config is None:
        return None
    checkpoint = open_unchanged(config.teacher, config.sha256)
    length = variant.sequence_length

    def build_score() -> Score:
        log.info("teacher %s: building its graph in %s", config.teacher, config.precision)
        weights = load_decoder_weights(checkpoint, length)
        matrices = quantize_rtn(weights, config.precision, ExportSettings(int8_block_size=32)).matrices
        with scratch_folder("teacher") as folder:
            graph = write_standard_graph(folder, weights, matrices)

        def score(ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
            logits_TV: NDArray[np.float32] = graph.run(ids_T[None])[0][0]
            return logits_TV

        return score

    # A graph's values depend on what rounds them and on what runs it, not only on the teacher's weights.
    key = digest(config.sha256, config.precision, ort.__version__)[:16]
    return Teacher(build_score, cache=cache_dir / "teachers" / key, length=length, top_k=config.top_k)


def check_same_vocabulary(checkpoint: Checkpoint, text: SourceText, vocab_size: int) -> None:
    """Raise `CheckpointError` for a teacher whose tokens mean something else than those of the student's text."""
    ours, theirs = text.tokenizer.get_vocab(), read_source_text(checkpoint, vocab_size).tokenizer.get_vocab()
    if ours == theirs:
        return
    token = min((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), default="")
    raise CheckpointError(
        f"teacher {checkpoint.where}: has another vocabulary than {text.where} ({token!r} is "
        f"{theirs.get(token, 'no token')} there, {ours.get(token, 'none')} here)",
        hint="take a teacher with the student's tokenizer",
    )
