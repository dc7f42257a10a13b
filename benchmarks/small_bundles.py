"""Bundles with random weights and a tokenizer that text goes through, for benchmarks of whole programs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from peer_models import draw_state

from ryot.deploy.export import ExportOptions, export_unscored
from ryot.deploy.settings import ExportSettings
from ryot.models.sources.folder import open_folder
from ryot.models.spec import DecoderSpec
from ryot.train.checkpoint import save_checkpoint
from ryot.train.corpus import load_corpus
from ryot.train.tokenizer import train_tokenizer

NUM_DOCUMENTS = 200


def make_bundles(
    spec: DecoderSpec, precisions: Iterable[str], folder: Path, *, settings: ExportSettings | None = None
) -> dict[str, Path]:
    """A bundle a precision, of one checkpoint; the tokenizer is a byte-level BPE of the standard library's text."""
    texts = [document.text for document in load_corpus().documents[:NUM_DOCUMENTS]]
    tokenizer = train_tokenizer(texts, spec.vocab_size).to_str().encode()
    save_checkpoint(folder / "checkpoint", spec=spec, state=draw_state(spec), tokenizer_json=tokenizer)
    prompts = np.random.default_rng(7).integers(1, spec.vocab_size, (4, spec.max_seq_len))
    options = ExportOptions(settings=settings or ExportSettings())
    source = open_folder(folder / "checkpoint")
    return {
        precision: export_unscored(source, precision, folder / precision, options=options, prompts=prompts)
        for precision in precisions
    }
