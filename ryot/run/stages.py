"""The stages of a run up to its trained and exported variants; `pipeline` calls them in order."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ryot.atomic import write_atomically
from ryot.config import KernelPlan, replace
from ryot.deploy.remeasure import threads_under
from ryot.deploy.settings import ExportSettings
from ryot.deploy.tune import choose_inference
from ryot.deploy.tune import format_decision as format_inference
from ryot.errors import DataError, TrainingError
from ryot.events import StageEvent
from ryot.optimize.kernels import format_decision as format_training
from ryot.report.rows import ExportedArtifact
from ryot.run.context import RunContext
from ryot.run.executor import Requirements
from ryot.run.exports import Exporter
from ryot.run.plan import RunPlan, plan_to_toml
from ryot.run.training import TrainResult, plan_training
from ryot.train.corpus import load_corpus
from ryot.train.dataset import Dataset, prepare_dataset

log = logging.getLogger(__name__)


def prepare_data(context: RunContext, plan: RunPlan) -> Dataset:
    """The corpus as shards; raises for one that is too small for a variant, or not the one the run began with."""
    with context.stage("data") as note:
        corpus = load_corpus(plan.options.data)
        vocab_size = plan.variants[0].model.vocab_size
        dataset, cached = prepare_dataset(
            corpus,
            vocab_size,
            context.settings.cache_dir,
            on_progress=lambda detail: context.events.emit(StageEvent(stage="data", status="progress", detail=detail)),
        )
        for variant in plan.variants:
            dataset.check_sequences(variant.model.max_seq_len, variant.train.batch_size)
        note.status = "cached" if cached else "end"
        note.detail = f"{dataset.name}, {dataset.num_tokens['train'] / 1e6:.2f} M training tokens"
        if corpus.num_copies:
            note.detail += f", {corpus.num_copies} of {len(corpus.documents)} documents are copies"
    journal = context.journal
    known = journal.find_stage("data", "corpus", "corpus")
    if known and known["sha256"] != dataset.corpus_sha256:
        raise DataError(
            f"data: the corpus has changed since this run began (sha256 {dataset.corpus_sha256[:12]}…, "
            f"was {known['sha256'][:12]}…)",
            hint="restore the text, or start a new run",
        )
    if not known:
        journal.finish_stage("data", "corpus", "corpus", sha256=dataset.corpus_sha256)
    return dataset


def tune_variants(context: RunContext, plan: RunPlan, dataset: Dataset) -> RunPlan:
    """The plan with how every variant is trained and exported: decided before the first step, and written down.

    A quick run is over before measuring could pay, so it takes the recipes' own kernels.
    """
    if plan.kernels:
        return plan
    options, cache_dir = plan.options, context.settings.cache_dir
    tuned = {v.name for v in plan.variants if v.tune and options.tune and not options.quick}
    if tuned:
        _open_executor(context, plan, dataset)
    kernels: dict[str, KernelPlan] = {}
    inference: dict[str, ExportSettings] = {}
    with context.stage("tune") as note:
        for variant in plan.variants:
            if variant.name not in tuned:
                kernels[variant.name] = replace(variant.kernels, threads=options.threads)
                continue
            training = context.executor.tune(variant, dataset, cache_dir, threads=options.threads)
            export = choose_inference(variant.model.spec, cache_dir)
            kernels[variant.name] = training.plan
            inference[variant.name] = export.settings
            log.info("%s\n%s", format_training(variant.name, training), format_inference(export))
            note.status = "cached" if training.cached and export.cached else "end"
            note.detail = f"{variant.name} trains with {describe_kernels(training.plan)}"
    plan = replace(plan, kernels=kernels, inference=inference)
    write_atomically(context.folder.plan, plan_to_toml(plan))
    return plan


def train_and_export(
    context: RunContext, plan: RunPlan, dataset: Dataset
) -> tuple[list[TrainResult], list[ExportedArtifact]]:
    """All trainings, in the plan's order, and the artifacts of the variants that have ended.

    A variant is exported as soon as it has ended, while others still train. Raises `TrainingError` when none has.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(context.settings.cache_dir / "inductor"))
    trainings = [
        plan_training(
            variant,
            seed,
            Path(dataset.path),
            plan.kernels[variant.name],
            workers=plan.options.workers_per_variant,
        )
        for variant in plan.variants
        for seed in range(plan.options.seeds)
    ]
    if not all(context.journal.has_ended(t.key, t.digest) for t in trainings):
        _open_executor(context, plan, dataset)
    exporter = Exporter(context, plan, dataset)
    with context.stage("train"):
        results = context.executor.train(
            trainings,
            folder=context.folder,
            journal=context.journal,
            emit=context.events.emit,
            on_done=exporter,
        )
    context.stage_times += exporter.times
    if all(r.error for r in results):
        raise TrainingError(f"no variant finished training: {'; '.join(str(r.error) for r in results)}")
    return results, exporter.artifacts


def _open_executor(context: RunContext, plan: RunPlan, dataset: Dataset) -> None:
    """Get the executor ready, which refuses at once what it can never do for this run."""
    if context.executor.is_open:
        return
    needed = Requirements(
        threads=plan.options.threads,
        workers=plan.options.workers_per_variant,
        bench_threads=threads_under(plan.targets),
        folders=(context.folder.path.absolute(), Path(dataset.path)),
    )
    with context.stage("cluster") as note:
        note.detail = context.executor.open(needed, context.folder.logs)


def describe_kernels(plan: KernelPlan) -> str:
    """A kernel plan in a few words."""
    parts = [f"attention {plan.attention}", plan.dtype, "compiled" if plan.compile else "eager"]
    parts.append(f"loss in chunks of {plan.loss_chunk}" if plan.loss_chunk else "loss whole")
    return ", ".join(parts)
