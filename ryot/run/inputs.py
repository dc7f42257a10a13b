"""What a run starts from: text, and models that exist; looked at before anything is computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ryot.deploy.text_check import open_text
from ryot.deploy.weights import check_weights, source_spec
from ryot.edge.bundle import TOKENIZER_NAME, hash_file
from ryot.errors import DataError, RyotError
from ryot.events import StageEvent
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.sources.opening import open_checkpoint
from ryot.models.spec import DecoderSpec
from ryot.reinforce.tasks import load_text
from ryot.run.context import RunContext
from ryot.run.plan import RunPlan
from ryot.run.sources import ImportConfig
from ryot.train.corpus import Corpus
from ryot.train.dataset import Dataset, prepare_dataset

#: Disk that a model's artifacts and its bundle take at most, in float32 weights.
_DISK_PER_MODEL = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedModel:
    """A model as it was found."""

    config: ImportConfig
    source: str
    """Where a worker finds it: the config's, with the commit of one from the hub."""
    sha256: str
    spec: DecoderSpec
    """Its context bounded as the config says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """Text and models of a run."""

    corpus_name: str
    corpus_sha256: str
    dataset: Dataset | None
    """The corpus as shards; None where nothing is trained."""
    models: tuple[ImportedModel, ...]

    def corpus_facts(self) -> dict[str, Any]:
        """What the report says about the text."""
        facts: dict[str, Any] = {"name": self.corpus_name, "sha256": self.corpus_sha256}
        if self.dataset is not None:
            facts |= {f"{split}_tokens": count for split, count in self.dataset.num_tokens.items()}
            facts["vocab_size"] = self.dataset.vocab_size
            facts["tokenizer_sha256"] = hash_file(self.dataset.path / TOKENIZER_NAME)
        return facts


def prepare_inputs(context: RunContext, plan: RunPlan) -> RunInputs:
    """The corpus, as shards where something is trained, and every model, its text tried and its weights not yet read.

    Raises for text that is too small for a variant or not what the run began with, and for a model that cannot be used.
    """

    def tell(detail: str) -> None:
        context.events.emit(StageEvent(stage="data", status="progress", detail=detail))

    with context.stage("data") as note:
        opened = [(config, open_checkpoint(config.source)) for config in plan.imports]
        _check_disk(context, [checkpoint for _, checkpoint in opened])
        specs = [source_spec(checkpoint, config.context or None) for config, checkpoint in opened]
        for (_, checkpoint), spec in zip(opened, specs):
            check_weights(checkpoint, spec)
        corpus = load_text(plan.options.data, plan.variants)
        models = []
        for (config, checkpoint), spec in zip(opened, specs):
            tell(f"looking at {config.name}")
            open_text(checkpoint, corpus, spec)
            models.append(
                ImportedModel(config=config, source=_pin(checkpoint, config), sha256=checkpoint.sha256, spec=spec)
            )
        details = [corpus.name]
        dataset = None
        if plan.variants:
            dataset, cached = _prepare_shards(context, plan, corpus, tell)
            note.status = "cached" if cached and not models else "end"
            details = [dataset.name, f"{dataset.num_tokens['train'] / 1e6:.2f} M training tokens"]
        if corpus.num_copies:
            details.append(f"{corpus.num_copies} of {len(corpus.documents)} documents are copies")
        details += [f"{m.config.name} of {m.spec.num_parameters / 1e6:.1f} M parameters" for m in models]
        note.detail = ", ".join(details)
    _check_unchanged(context, corpus.sha256)
    return RunInputs(corpus_name=corpus.name, corpus_sha256=corpus.sha256, dataset=dataset, models=tuple(models))


def _prepare_shards(
    context: RunContext, plan: RunPlan, corpus: Corpus, tell: Callable[[str], None]
) -> tuple[Dataset, bool]:
    vocab_size = plan.variants[0].model.vocab_size
    dataset, cached = prepare_dataset(corpus, vocab_size, context.settings.cache_dir, on_progress=tell)
    for variant in plan.variants:
        dataset.check_sequences(variant.model.max_seq_len, variant.train.batch_size)
    return dataset, cached


def _pin(checkpoint: Checkpoint, config: ImportConfig) -> str:
    """The source, naming the commit of one from the hub."""
    if checkpoint.revision is None:
        return config.source
    return f"{config.source.partition('@')[0]}@{checkpoint.revision}"


def _check_unchanged(context: RunContext, corpus_sha256: str) -> None:
    """Raise `DataError` when the run began with other text."""
    journal = context.journal
    known = journal.find_stage("data", "corpus", "corpus")
    if known and known["sha256"] != corpus_sha256:
        raise DataError(
            f"data: the corpus has changed since this run began (sha256 {corpus_sha256[:12]}…, "
            f"was {known['sha256'][:12]}…)",
            hint="restore the text, or start a new run",
        )
    if not known:
        journal.finish_stage("data", "corpus", "corpus", sha256=corpus_sha256)


def _check_disk(context: RunContext, checkpoints: list[Checkpoint]) -> None:
    """Raise `RyotError` when the run folder's disk cannot hold what is made of the models."""
    needed = _DISK_PER_MODEL * sum(checkpoint.float_bytes() for checkpoint in checkpoints)
    free = shutil.disk_usage(context.folder.path).free
    if free < needed:
        raise RyotError(
            f"output {context.folder}: {free / 1e6:.0f} MB free on the disk, expected about {needed / 1e6:.0f} MB "
            "for the artifacts of the models",
            hint="make room, or choose another folder with -o",
        )
