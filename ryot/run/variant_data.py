"""The data of one recipe: the corpus under the tokenizer that it uses, tried out before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ryot.config import VariantConfig
from ryot.deploy.teacher import check_same_vocabulary
from ryot.models.registry import read_spec
from ryot.train.corpus import Corpus
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.initial import open_unchanged
from ryot.train.lora import check_targets
from ryot.train.packing import PackedSequences
from ryot.train.source_text import SourceText, read_source_text

log = logging.getLogger(__name__)


def prepare_variant(
    variant: VariantConfig,
    corpus: Corpus,
    cache_dir: Path,
    *,
    on_progress: Callable[[str], None] = log.info,
    on_report: Callable[[str], None] = log.info,
) -> tuple[Dataset, bool]:
    """The corpus for a recipe, made now or found in the cache; the flag says which (True: found).

    `on_report` hears what becomes of records. Raises `CheckpointError` for a source that has changed or whose tokenizer
    is not its teacher's, `ConfigError` for adapters that go nowhere, and `DataError` for data that is too little or
    does not fit the model's text.
    """
    text = _find_text(variant)
    if variant.lora is not None:
        check_targets(variant.model.spec, variant.lora)
    dataset, cached = prepare_dataset(corpus, variant.model.vocab_size, cache_dir, text=text, on_progress=on_progress)
    length, batch_size = variant.sequence_length, variant.train.batch_size
    if not dataset.has_records:
        dataset.check_sequences(length, batch_size)
        return dataset, cached
    for what, count in dataset.unusual.items():
        log.warning("data: %d %s", count, what)
    for split in ("val", "test", "train"):
        report = PackedSequences(dataset, split, length).report
        if report.truncated or report.refused:
            log.warning(
                "data: of the %s split, in sequences of %d tokens, %d records lose their end and %d are left out, "
                "because nothing of their answer fits",
                split,
                length,
                report.truncated,
                report.refused,
            )
    report.check_batch(batch_size, length)
    on_report(f"{variant.name}: {report.text}")
    return dataset, cached


def _find_text(variant: VariantConfig) -> SourceText | None:
    """The text side of the model that brings the tokenizer; None where it is learned."""
    source = variant.text_source
    if source is None:
        return None
    checkpoint = open_unchanged(source, variant.sources[source])
    vocab_size = read_spec(checkpoint.config, checkpoint.where).vocab_size
    text = read_source_text(checkpoint, vocab_size)
    if variant.distill is not None and variant.distill.teacher != source:
        check_same_vocabulary(open_unchanged(variant.distill.teacher, variant.distill.sha256), text, vocab_size)
    return text
