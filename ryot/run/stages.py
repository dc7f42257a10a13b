"""The stages of a run up to its trained and exported variants; `pipeline` calls them in order."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ryot.atomic import write_atomically
from ryot.config import Device, KernelPlan, VariantConfig, replace
from ryot.deploy.remeasure import threads_under
from ryot.deploy.settings import ExportSettings
from ryot.deploy.tune import choose_inference
from ryot.deploy.tune import format_decision as format_inference
from ryot.errors import ExportError, TrainingError
from ryot.optimize.kernels import format_decision as format_training
from ryot.report.rows import ExportedArtifact
from ryot.run.context import RunContext
from ryot.run.executor import Requirements
from ryot.run.exports import Exporter
from ryot.run.imports import Importer, ImportResult
from ryot.run.inputs import RunInputs
from ryot.run.plan import RunPlan, plan_to_toml
from ryot.run.training import TrainResult, plan_training
from ryot.train.device import asked_device, place_kernels

log = logging.getLogger(__name__)


def tune_variants(context: RunContext, plan: RunPlan, inputs: RunInputs) -> RunPlan:
    """The plan with how every variant is trained and exported: decided before the first step, and written down.

    A quick run is over before measuring could pay, so it takes the recipes' own kernels and the usual settings.
    """
    if plan.kernels or plan.inference:
        return plan
    options, cache_dir = plan.options, context.settings.cache_dir
    may_tune = options.tune and not options.quick
    if plan.variants:
        _open_executor(context, plan, inputs)
    kernels: dict[str, KernelPlan] = {}
    inference: dict[str, ExportSettings] = {}
    with context.stage("tune") as note:
        for variant in plan.variants:
            device = _choose_device(context, plan, variant)
            placed = replace(variant, kernels=place_kernels(variant, device, options.threads))
            if not (may_tune and variant.tune):
                kernels[variant.name] = placed.kernels
                continue
            training = context.executor.tune(placed, inputs.datasets[variant.name], cache_dir, threads=options.threads)
            export = choose_inference(variant.model.spec, cache_dir)
            kernels[variant.name] = training.plan
            inference[variant.name] = export.settings
            log.info("%s\n%s", format_training(variant.name, training), format_inference(export))
            note.status = "cached" if training.cached and export.cached else "end"
            note.detail = f"{variant.name} trains with {describe_kernels(training.plan)}"
        for model in inputs.models:
            inference[model.config.name] = ExportSettings()
            if may_tune:
                export = choose_inference(model.spec, cache_dir)
                inference[model.config.name] = export.settings
                log.info("%s: %s", model.config.name, format_inference(export))
    plan = replace(plan, kernels=kernels, inference=inference)
    write_atomically(context.folder.plan, plan_to_toml(plan))
    return plan


def import_models(context: RunContext, plan: RunPlan, inputs: RunInputs) -> list[ImportResult]:
    """What was exported of every model of the plan, in its order. Raises what stopped them when none was, of any kind.

    They come before the trainings: each is either refused soon or done.
    """
    importer = Importer(context, plan, inputs)
    if importer.jobs:
        _open_executor(context, plan, inputs)
        context.executor.export(importer.jobs, threads=plan.options.threads, listener=importer)
    context.stage_times += importer.times
    results = importer.results()
    errors = [r.error for r in results if r.error]
    if errors and len(errors) == len(results) and not plan.variants:
        if len(errors) == 1:
            raise errors[0]
        raise ExportError(f"no model was exported: {'; '.join(map(str, errors))}")
    return results


def train_and_export(
    context: RunContext, plan: RunPlan, inputs: RunInputs
) -> tuple[list[TrainResult], list[ExportedArtifact]]:
    """All trainings, in the plan's order, and the artifacts of the variants that have ended.

    A variant is exported as soon as it has ended, while others still train. Raises `TrainingError` when none has, and
    no model can stand in for them.
    """
    if not inputs.datasets:
        return [], []
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(context.settings.cache_dir / "inductor"))
    trainings = [
        plan_training(
            variant,
            seed,
            Path(inputs.datasets[variant.name].path),
            plan.kernels[variant.name],
            workers=plan.options.workers_per_variant,
        )
        for variant in plan.variants
        for seed in range(plan.options.seeds)
    ]
    if not all(context.journal.has_ended(t.key, t.digest) for t in trainings):
        _open_executor(context, plan, inputs)
    exporter = Exporter(context, plan, inputs.datasets)
    with context.stage("train"):
        results = context.executor.train(
            trainings,
            folder=context.folder,
            journal=context.journal,
            emit=context.events.emit,
            on_done=exporter,
        )
    context.stage_times += exporter.times
    if all(r.error for r in results) and not plan.imports:
        raise TrainingError(f"no variant finished training: {'; '.join(str(r.error) for r in results)}")
    return results, exporter.artifacts


def _open_executor(context: RunContext, plan: RunPlan, inputs: RunInputs) -> None:
    """Get the executor ready, which refuses at once what it can never do for this run."""
    if context.executor.is_open:
        return
    folders = [context.folder.path.absolute()]
    folders += dict.fromkeys(Path(dataset.path) for dataset in inputs.datasets.values())
    needed = Requirements(
        threads=plan.options.threads,
        workers=plan.options.workers_per_variant if plan.variants else 1,
        bench_threads=threads_under(plan.targets),
        gpus=1 if plan.variants and plan.options.device == "cuda" else 0,
        folders=tuple(folders),
    )
    with context.stage("cluster") as note:
        note.detail = context.executor.open(needed, context.folder.logs)


def _choose_device(context: RunContext, plan: RunPlan, variant: VariantConfig) -> Device:
    """Where a variant is trained; GPUs that are asked for and are not there are refused before its first step."""
    options = plan.options
    asked = asked_device(variant, options.device)
    if asked != "auto":
        return asked
    workers = options.workers_per_variant
    return "cuda" if context.executor.has_gpus(threads=options.threads, workers=workers) else "cpu"


def describe_kernels(plan: KernelPlan) -> str:
    """A kernel plan in a few words."""
    parts = ["on a GPU"] if plan.device == "cuda" else []
    parts += [f"attention {plan.attention}", plan.dtype, "compiled" if plan.compile else "eager"]
    parts.append(f"loss in chunks of {plan.loss_chunk}" if plan.loss_chunk else "loss whole")
    return ", ".join(parts)
