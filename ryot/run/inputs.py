"""What a run starts from: text, and models that exist; looked at before anything is computed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass

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
from ryot.run.variant_data import prepare_variant
from ryot.train.dataset import Dataset

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
    datasets: Mapping[str, Dataset]
    """The corpus as shards for each variant that is trained; those of one tokenizer share them."""
    models: tuple[ImportedModel, ...]

    def corpus_facts(self) -> dict[str, object]:
        """What the report says about the text."""
        facts: dict[str, object] = {"name": self.corpus_name, "sha256": self.corpus_sha256}
        if dataset := next(iter(self.datasets.values()), None):
            facts |= {f"{split}_tokens": count for split, count in dataset.num_tokens.items()}
            facts["vocab_size"] = dataset.vocab_size
            facts["tokenizer_sha256"] = hash_file(dataset.path / TOKENIZER_NAME)
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
        known = _known_corpus(context, corpus.sha256)
        models = []
        for (config, checkpoint), spec in zip(opened, specs):
            tell(f"looking at {config.name}")
            open_text(checkpoint, corpus, spec)
            models.append(
                ImportedModel(config=config, source=_pin(checkpoint, config), sha256=checkpoint.sha256, spec=spec)
            )
        details = [corpus.name]
        datasets: dict[str, Dataset] = {}
        found = []
        for variant in plan.variants:
            datasets[variant.name], cached = prepare_variant(
                variant, corpus, context.settings.cache_dir, on_progress=tell, on_report=details.append
            )
            found.append(cached)
        if plan.variants:
            note.status = "cached" if all(found) and not models else "end"
            tokens = dict.fromkeys(d.num_tokens["train"] for d in datasets.values())
            details.insert(1, f"{', '.join(f'{t / 1e6:.2f}' for t in tokens)} M training tokens")
        if corpus.num_copies:
            details.append(f"{corpus.num_copies} of {len(corpus.documents)} documents are copies")
        details += [f"{m.config.name} of {m.spec.num_parameters / 1e6:.1f} M parameters" for m in models]
        note.detail = ", ".join(details)
    if not known:
        context.journal.finish_stage("data", "corpus", "corpus", sha256=corpus.sha256)
    return RunInputs(corpus_name=corpus.name, corpus_sha256=corpus.sha256, datasets=datasets, models=tuple(models))


def _pin(checkpoint: Checkpoint, config: ImportConfig) -> str:
    """The source, naming the commit of one from the hub."""
    if checkpoint.revision is None:
        return config.source
    return f"{config.source.partition('@')[0]}@{checkpoint.revision}"


def _known_corpus(context: RunContext, corpus_sha256: str) -> bool:
    """Whether the run began with this text already. Raises `DataError` when it was another one."""
    known = context.journal.find_stage("data", "corpus", "corpus")
    if known and known["sha256"] != corpus_sha256:
        raise DataError(
            f"data: the corpus has changed since this run began (sha256 {corpus_sha256[:12]}…, "
            f"was {known['sha256'][:12]}…)",
            hint="restore the text, or start a new run",
        )
    return known is not None


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
