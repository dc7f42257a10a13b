"""The main job from end to end: data, cluster, training, export, measurement, report, bundle.

    run.toml        the resolved plan, kernel decisions included
    events.jsonl    everything that happened
    journal.jsonl   what counts: accepted checkpoints and finished stages, fsynced
    variants/NAME/seed-K/attempt-N/step-S/   checkpoints
    variants/NAME/seed-K/forms/PRECISION/    exported forms, each a bundle
    report.json report.md report.html        the result
    bundle/                                  the chosen form with its record

A stage whose inputs are unchanged is not done again when the run is resumed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ryot
from ryot.cluster.driver import train_variants
from ryot.cluster.jobs import DriverOptions, TrainResult, plan_job
from ryot.cluster.journal import Journal, RunLock
from ryot.cluster.runtime import Cluster, ClusterOptions, open_cluster
from ryot.cluster.tuning import tune_on_cluster
from ryot.config import PRECISIONS, KernelPlan, digest, replace, to_mapping
from ryot.deploy.bundle import finish_bundle
from ryot.deploy.export import ExportOptions, export_variant
from ryot.deploy.forms import QuantizeOptions
from ryot.deploy.remeasure import spec_under
from ryot.deploy.tune import choose_inference
from ryot.deploy.tune import format_decision as format_inference
from ryot.edge.bundle import hash_file, load_bundle
from ryot.edge.machine import describe_cpu, sums_int8_exactly
from ryot.edge.measure import measure_rounds, record_environment
from ryot.edge.protocol import MeasureResult
from ryot.errors import (
    EXIT_FAILED,
    EXIT_QUALITY,
    DataError,
    Interrupted,
    QualityError,
    RyotError,
    TrainingError,
    worst_exit_code,
)
from ryot.events import Event, EventLog, GateEvent, MeasureEvent, StageEvent, read_events
from ryot.optimize.kernels import format_decision as format_training
from ryot.plan import InferencePlan, RunPlan, plan_to_toml
from ryot.report.build import FormFacts, build_report, curves_from_events
from ryot.report.html import render_html
from ryot.report.markdown import render_markdown
from ryot.report.rows import (
    Report,
    VariantRow,
    arm_name,
    build_record,
    report_to_dict,
    save_report,
    write_atomically,
)
from ryot.report.targets import Target, load_targets
from ryot.train.corpus import load_corpus
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.loop import TrainJob

log = logging.getLogger(__name__)

PLAN_FILE = "run.toml"
MEASURE_FILE = "measure.json"
#: Runs of a measuring process in a quick run; the full number is MeasureSpec's own.
QUICK_RUNS, QUICK_TIME_S, QUICK_ROUNDS = 5, 0.2, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """How a run is carried out; none of it changes what is computed."""

    command: str
    cache_dir: Path
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    driver: DriverOptions = field(default_factory=DriverOptions)
    listeners: Sequence[Callable[[Event], None]] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    report: Report
    exit_code: int


def start_run(run_dir: Path, plan: RunPlan, settings: RunSettings) -> Outcome:
    """Begin a run in an empty folder, or one that does not exist yet, and carry it through."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / PLAN_FILE, plan_to_toml(plan))
    return resume_run(run_dir, plan, settings)


def resume_run(run_dir: Path, plan: RunPlan, settings: RunSettings) -> Outcome:
    """Carry a run through from wherever it stopped.

    Raises `Interrupted` with the command that resumes it, and every other `RyotError` for what cannot be carried
    through; what is done by then stays done.
    """
    with RunLock(run_dir):
        run = _Run(run_dir, plan, settings)
        try:
            return run.carry_through()
        except KeyboardInterrupt:
            raise Interrupted("stopped by a signal", hint=run.resume_hint) from None
        except Interrupted as error:
            raise Interrupted(str(error), hint=run.resume_hint) from None
        finally:
            run.close()


class _Run:
    def __init__(self, run_dir: Path, plan: RunPlan, settings: RunSettings):
        self.run_dir, self.plan, self.settings = run_dir, plan, settings
        self.options = plan.options
        self.targets: list[Target] = load_targets(self.options.target)
        self.journal = Journal(run_dir)
        self.events = EventLog(run_dir / "events.jsonl")
        self.events.listeners += settings.listeners
        self.stages: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.forms: list[FormFacts] = []
        self._export_lock = threading.Lock()
        self._trained: dict[str, list[TrainResult]] = {}

    @property
    def resume_hint(self) -> str:
        return f"go on with: ryot-deploy cluster-run --resume {self.run_dir}"

    def carry_through(self) -> Outcome:
        """All stages in order."""
        self.journal.open_run()
        self._check_disk()
        dataset = self._prepare_data()
        results = self._train(dataset)
        if all(r.error for r in results):
            errors = "; ".join(str(r.error) for r in results)
            raise TrainingError(f"no variant finished training: {errors}", hint=self.resume_hint)
        measured, machine = self._measure()
        return self._conclude(dataset, results, measured, machine)

    def close(self) -> None:
        self.events.close()
        self.journal.close()

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Tell that a stage begins and how it ended; what is put into the yielded dict as `detail` is told too."""
        self.events.emit(StageEvent(stage=name, status="begin"))
        begin, said = time.monotonic(), {"status": "end", "detail": ""}
        try:
            yield said
        except BaseException as error:
            detail = str(error) or type(error).__name__
            self.events.emit(StageEvent(stage=name, status="failed", wall_s=time.monotonic() - begin, detail=detail))
            raise
        wall_s = time.monotonic() - begin
        self.stages.append({"stage": name, "variant": "", "wall_s": round(wall_s, 3)})
        self.events.emit(StageEvent(stage=name, status=said["status"], wall_s=wall_s, detail=said["detail"]))

    def _check_disk(self) -> None:
        """Checkpoints hold weights and two moments; a few are kept, and each form is at most the weights again."""
        weights = sum(4 * v.model.num_parameters for v in self.plan.variants) * self.options.seeds
        needed = 4 * 3 * weights + 6 * weights + 100_000_000
        free = shutil.disk_usage(self.run_dir).free
        if free < needed:
            raise RyotError(
                f"output {self.run_dir}: {free / 1e6:.0f} MB free on the disk, expected about {needed / 1e6:.0f} MB",
                hint="make room, or choose another folder with -o",
            )

    # Data

    def _prepare_data(self) -> Dataset:
        with self._stage("data") as said:
            vocab_size = self.plan.variants[0].model.vocab_size
            corpus = load_corpus(self.options.data)
            dataset, cached = prepare_dataset(corpus, vocab_size, self.settings.cache_dir)
            for variant in self.plan.variants:
                dataset.check_sequences(variant.model.max_seq_len, variant.train.batch_size)
            said["status"] = "cached" if cached else "end"
            said["detail"] = f"{dataset.name}, {dataset.num_tokens['train'] / 1e6:.2f} M training tokens"
        known = self.journal.find_stage("data", "corpus", "corpus")
        if known and known["sha256"] != dataset.corpus_sha256:
            raise DataError(
                f"data: the corpus has changed since this run began (sha256 {dataset.corpus_sha256[:12]}…, "
                f"was {known['sha256'][:12]}…)",
                hint="restore the text, or start a new run",
            )
        if not known:
            self.journal.finish_stage("data", "corpus", "corpus", sha256=dataset.corpus_sha256)
        return dataset

    # Training and export

    def _train(self, dataset: Dataset) -> list[TrainResult]:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.settings.cache_dir / "inductor"))
        with self._stage("cluster") as said:
            cluster = open_cluster(self.settings.cluster, log_dir=self.run_dir / "logs")
            nodes = cluster.nodes()
            said["detail"] = f"{len(nodes)} node, {sum(n.cpus for n in nodes):g} cores at {cluster.address}"
        with cluster:
            self._tune(cluster, dataset)
            jobs = [
                plan_job(
                    TrainJob(variant=variant, seed=seed, dataset_dir=str(dataset.path)), self.plan.kernels[variant.name]
                )
                for variant in self.plan.variants
                for seed in range(self.options.seeds)
            ]
            with self._stage("train"):
                results = train_variants(
                    jobs,
                    cluster=cluster,
                    run_dir=self.run_dir,
                    journal=self.journal,
                    emit=self.events.emit,
                    options=self.settings.driver,
                    on_done=lambda result: self._on_trained(result, dataset),
                )
        return sorted(results, key=lambda r: ([v.name for v in self.plan.variants].index(r.variant), r.seed))

    def _tune(self, cluster: Cluster, dataset: Dataset) -> None:
        """Decide how every variant is trained and exported, before the first step, and write it down.

        A quick run is over before measuring could pay, so it takes the recipes' own kernels.
        """
        if self.plan.kernels:
            return
        kernels: dict[str, KernelPlan] = {}
        inference: dict[str, InferencePlan] = {}
        cache_dir, threads = self.settings.cache_dir, self.options.threads
        with self._stage("tune") as said:
            for variant in self.plan.variants:
                if not (variant.tune and self.options.tune) or self.options.quick:
                    kernels[variant.name] = replace(variant.kernels, threads=threads)
                    continue
                training = tune_on_cluster(cluster, variant, dataset, cache_dir, threads=threads)
                export = choose_inference(variant.model, cache_dir)
                kernels[variant.name] = training.plan
                inference[variant.name] = InferencePlan(
                    int8_block_size=export.quantize.int8_block_size,
                    int4_block_size=export.quantize.int4_block_size,
                    dynamic_bits=export.quantize.dynamic_bits,
                    fastest=export.latency,
                )
                log.info("%s\n%s", format_training(variant.name, training), format_inference(export))
                said["status"] = "cached" if training.cached and export.cached else "end"
                said["detail"] = f"{variant.name} trains with {format_plan(training.plan)}"
        self.plan = replace(self.plan, kernels=kernels, inference=inference)
        write_atomically(self.run_dir / PLAN_FILE, plan_to_toml(self.plan))

    def _on_trained(self, result: TrainResult, dataset: Dataset) -> None:
        """Export the best seed of a variant once all its seeds have ended; other variants still train meanwhile."""
        seeds = self._trained.setdefault(result.variant, [])
        seeds.append(result)
        if len(seeds) < self.options.seeds:
            return
        finished = [r for r in seeds if r.error is None and r.checkpoint]
        if finished:
            self._export(min(finished, key=lambda r: (r.facts["val_loss"], r.seed)), dataset)

    def _export(self, result: TrainResult, dataset: Dataset) -> None:
        assert result.checkpoint is not None
        variant = self.plan.variant(result.variant)
        precisions = self.plan.precisions(variant.name)
        quantize = self._quantize_options(variant.name)
        inputs = digest(result.sha256, precisions, quantize, ryot.__version__)
        root = self.run_dir / "variants" / variant.name / f"seed-{result.seed}" / "forms"
        key = f"{variant.name}/seed-{result.seed}"
        known = self.journal.find_stage("export", key, inputs)
        if known and all((self.run_dir / f["path"]).is_dir() for f in known["forms"] if f["path"]):
            self.forms += [FormFacts(**f) for f in known["forms"]]
            self._tell_export(result, "cached", 0.0)
            return
        begin = time.monotonic()
        shutil.rmtree(root, ignore_errors=True)
        options = ExportOptions(
            name=f"ryot-{variant.name}",
            variant=variant.name,
            seed=result.seed,
            quantize=quantize,
            config=to_mapping(variant),
        )
        try:
            exported = export_variant(result.checkpoint, root, precisions, dataset, options=options)
        except QualityError as error:
            self._gate(result, "parity", passed=False, detail=str(error))
            forms = [
                FormFacts(
                    variant=variant.name, seed=result.seed, precision=p, size_bytes=0, passed=False, reason=str(error)
                )
                for p in precisions
            ]
        else:
            parity = exported[0].parity
            self._gate(result, "parity", passed=True, value=parity.max_difference, limit=parity.tolerance)
            forms = [
                FormFacts(
                    variant=variant.name,
                    seed=result.seed,
                    precision=form.precision,
                    size_bytes=form.size_bytes,
                    context_tokens=variant.model.max_seq_len,
                    quality=form.quality.as_dict(),
                    passed=form.passed,
                    reason=form.reason,
                    path=form.path.relative_to(self.run_dir).as_posix(),
                )
                for form in exported
            ]
            for form in exported:
                self._gate(
                    result,
                    f"quality {form.precision}",
                    passed=form.passed,
                    value=form.quality.bpb_ratio,
                    limit=options.max_bpb_ratio,
                    detail=form.reason,
                )
        self.journal.finish_stage("export", key, inputs, forms=[_plain(f) for f in forms])
        self.forms += forms
        self._tell_export(result, "end", time.monotonic() - begin)

    def _quantize_options(self, variant: str) -> QuantizeOptions:
        decision = self.plan.inference.get(variant)
        if decision is None:
            return QuantizeOptions(dynamic_bits=8 if sums_int8_exactly(describe_cpu()["isa"]) else 7)
        return QuantizeOptions(
            int8_block_size=decision.int8_block_size,
            int4_block_size=decision.int4_block_size,
            dynamic_bits=decision.dynamic_bits,
        )

    def _gate(self, result: TrainResult, gate: str, *, passed: bool, **facts: Any) -> None:
        values = {"value": 0.0, "limit": 0.0, **facts}
        self.events.emit(GateEvent(variant=result.variant, seed=result.seed, gate=gate, passed=passed, **values))

    def _tell_export(self, result: TrainResult, status: str, wall_s: float) -> None:
        self.stages.append({"stage": "export", "variant": result.variant, "wall_s": round(wall_s, 3)})
        self.events.emit(
            StageEvent(stage="export", status=status, variant=result.variant, seed=result.seed, wall_s=wall_s)
        )

    # Measurement

    def _measure(self) -> tuple[list[MeasureResult], dict[str, Any]]:
        """Measure every exported form, alone on the machine; forms that a gate stopped are measured and marked too."""
        brief = {"min_runs": QUICK_RUNS, "min_time_s": QUICK_TIME_S} if self.options.quick else {}
        specs = {
            arm_name(f.variant, f.seed, f.precision): spec_under(
                self.targets, load_bundle(self.run_dir / f.path, verify=False), **brief
            )
            for f in sorted(self.forms, key=lambda f: (f.variant, f.seed, f.precision))
            if f.path
        }
        rounds = QUICK_ROUNDS if self.options.quick else self.options.rounds
        manifests = {arm: load_bundle(Path(spec.bundle)).files for arm, spec in specs.items()}
        # Where the run folder lies is no input: it may be moved and resumed.
        asked = {arm: replace(spec, bundle="") for arm, spec in specs.items()}
        inputs = digest(asked, manifests, rounds, ryot.__version__)
        file = self.run_dir / MEASURE_FILE
        with self._stage("measure") as said:
            if self.journal.find_stage("measure", "all", inputs) is not None and file.exists():
                said["status"] = "cached"
                values = json.loads(file.read_text())
                return [MeasureResult.from_mapping(r) for r in values["results"]], values["machine"]
            machine = record_environment()
            results = measure_rounds(specs, rounds=rounds, on_result=self._tell_measured)
            said["detail"] = f"{len(specs)} forms, {rounds} rounds"
            values = {"machine": machine, "results": [r.to_mapping() for r in results]}
            write_atomically(file, json.dumps(values))
            self.journal.finish_stage("measure", "all", inputs)
        return results, machine

    def _tell_measured(self, result: MeasureResult) -> None:
        self.events.emit(
            MeasureEvent(
                arm=result.arm,
                round=result.round,
                ok=result.ok,
                ttft_ms=_median(result.ttft_ms),
                decode_tok_s=_median(result.decode_tok_s),
                peak_rss_bytes=result.peak_rss_bytes,
                reason=result.reason,
            )
        )

    # Result

    def _conclude(
        self, dataset: Dataset, results: list[TrainResult], measured: list[MeasureResult], machine: dict[str, Any]
    ) -> Outcome:
        """Judge, write report and bundle, and say how the run ended."""
        with self._stage("report"):
            report = self._build_report(dataset, results, measured, machine)
            target = self.run_dir / "bundle"
            shutil.rmtree(target, ignore_errors=True)
            if report.bundle:
                row = next(r for r in report.rows if r.chosen)
                finish_bundle(self.run_dir / row.path, target, report_to_dict(build_record(report, row)))
            save_report(report, self.run_dir / "report.json")
            write_atomically(self.run_dir / "report.md", render_markdown(report))
            write_atomically(self.run_dir / "report.html", render_html(report))
        return Outcome(report, self._exit_code(report, results))

    def _build_report(
        self, dataset: Dataset, results: list[TrainResult], measured: list[MeasureResult], machine: dict[str, Any]
    ) -> Report:
        def build(bundle: str | None) -> Report:
            return build_report(
                run_id=self.run_dir.name,
                command=self.settings.command,
                forms=self.forms_in_order(),
                results=measured,
                targets=self.targets,
                machine=machine,
                corpus={
                    "name": dataset.name,
                    "sha256": dataset.corpus_sha256,
                    **{f"{split}_tokens": count for split, count in dataset.num_tokens.items()},
                    "vocab_size": dataset.vocab_size,
                    "tokenizer_sha256": hash_file(dataset.path / "tokenizer.json"),
                },
                variants=self._variant_rows(results),
                preset=self.options.preset,
                plan=to_mapping(self.plan),
                quick=self.options.quick,
                stages=self.stages,
                bundle=bundle,
                notes=self.notes,
            )

        report = build(None)
        return build("bundle") if any(row.chosen for row in report.rows) else report

    def forms_in_order(self) -> list[FormFacts]:
        """The forms as the tables list them: variants and precisions as they were asked for."""
        names = [v.name for v in self.plan.variants]
        return sorted(self.forms, key=lambda f: (names.index(f.variant), f.seed, PRECISIONS.index(f.precision)))

    def _variant_rows(self, results: list[TrainResult]) -> list[VariantRow]:
        curves = curves_from_events(read_events(self.run_dir / "events.jsonl"))
        rows = []
        for result in results:
            variant, facts = self.plan.variant(result.variant), result.facts
            wall_s = facts.get("train_wall_s")
            curve, train_curve = curves.get((result.variant, result.seed), ((), ()))
            rows.append(
                VariantRow(
                    name=result.variant,
                    seed=result.seed,
                    params=variant.model.num_parameters,
                    tokens=result.step * variant.step_tokens,
                    train_wall_s=wall_s,
                    tokens_per_s=result.step * variant.step_tokens / wall_s if wall_s else None,
                    concurrent=len(results) > 1,
                    failed=str(result.error or ""),
                    summary=variant.summary,
                    curve=curve,
                    train_curve=train_curve,
                    **{
                        name: facts.get(name)
                        for name in (
                            "compile_s",
                            "initial_val_loss",
                            "val_loss",
                            "val_bpb",
                            "test_loss",
                            "test_bpb",
                            "grad_norm_max",
                        )
                    },
                )
            )
        return rows

    def _exit_code(self, report: Report, results: list[TrainResult]) -> int:
        assert report.choice is not None
        codes = [report.choice.exit_code]
        if any(r.error for r in results):
            codes.append(EXIT_FAILED)
        if self.options.precisions and any(not f.passed for f in self.forms):
            codes.append(EXIT_QUALITY)  # a form asked for by name
        return worst_exit_code(codes)


def format_plan(plan: Any) -> str:
    """A kernel plan in a few words."""
    parts = [f"attention {plan.attention}", plan.dtype, "compiled" if plan.compile else "eager"]
    parts.append(f"loss in chunks of {plan.loss_chunk}" if plan.loss_chunk else "loss whole")
    return ", ".join(parts)


def _plain(facts: FormFacts) -> dict[str, Any]:
    return to_mapping(facts)


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
