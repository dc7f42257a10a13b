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
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ryot
from ryot.atomic import write_atomically
from ryot.cluster.conclusion import Findings, build_run_report, decide_exit_code, write_outcome
from ryot.cluster.driver import train_variants
from ryot.cluster.exports import Exporter
from ryot.cluster.jobs import DriverOptions, TrainResult, plan_job
from ryot.cluster.journal import Journal, RunLock
from ryot.cluster.measuring import find_node, measure_on_cluster
from ryot.cluster.placement import Need, Placement
from ryot.cluster.probe import probe_nodes
from ryot.cluster.runtime import Cluster, ClusterOptions, build_cluster
from ryot.cluster.tuning import tune_on_cluster
from ryot.config import KernelPlan, digest, replace
from ryot.deploy.remeasure import QUICK_SPEC, spec_under, threads_under
from ryot.deploy.settings import ExportSettings
from ryot.deploy.tune import choose_inference
from ryot.deploy.tune import format_decision as format_inference
from ryot.edge.bundle import load_bundle
from ryot.edge.measure import measure_rounds, record_environment
from ryot.edge.protocol import MeasureResult
from ryot.errors import (
    DataError,
    Interrupted,
    RyotError,
    TrainingError,
)
from ryot.events import Event, EventLog, MeasureEvent, StageEvent
from ryot.optimize.kernels import format_decision as format_training
from ryot.plan import RunPlan, plan_to_toml
from ryot.report.build import FormFacts
from ryot.report.rows import (
    Report,
    arm_name,
)
from ryot.report.targets import Target
from ryot.train.corpus import load_corpus
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.loop import TrainJob
from ryot.train.parallel import check_shares

log = logging.getLogger(__name__)

PLAN_FILE = "run.toml"
MEASURE_FILE = "measure.json"
#: Rounds of measurement in a quick run.
QUICK_ROUNDS = 3


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
    for variant in plan.variants:
        check_shares(TrainJob(variant=variant, seed=0, dataset_dir=""), plan.options.workers_per_variant)
    with _disk_errors(run_dir, "start the run again"):
        run_dir.mkdir(parents=True, exist_ok=True)
        _check_disk(run_dir, plan)
        write_atomically(run_dir / PLAN_FILE, plan_to_toml(plan))
    return _carry_through(run_dir, plan, settings)


def resume_run(run_dir: Path, plan: RunPlan, settings: RunSettings) -> Outcome:
    """Carry a run through from wherever it stopped.

    Raises `Interrupted` with the command that resumes it, and every other `RyotError` for what cannot be carried
    through; what is done by then stays done.
    """
    _check_disk(run_dir, plan)
    return _carry_through(run_dir, plan, settings)


def _carry_through(run_dir: Path, plan: RunPlan, settings: RunSettings) -> Outcome:
    way_on = f"go on with: ryot-deploy cluster-run --resume {run_dir}"
    with RunLock(run_dir), _disk_errors(run_dir, way_on):
        run = _Run(run_dir, plan, settings, way_on)
        try:
            return run.carry_through()
        except KeyboardInterrupt:
            raise Interrupted("stopped by a signal", hint=way_on) from None
        except Interrupted as error:
            raise Interrupted(str(error), hint=way_on) from None
        finally:
            run.close()


@contextlib.contextmanager
def _disk_errors(run_dir: Path, way_on: str) -> Iterator[None]:
    """A disk that is full, read-only or gone is one line with what to do; nothing that counts is lost by it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        first = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix this"
        raise RyotError(f"run {run_dir}: {what}{error.strerror or error}", hint=f"{first}, then {way_on}") from error


def _check_disk(run_dir: Path, plan: RunPlan) -> None:
    """Checkpoints hold weights and two moments; a few are kept, and each form is at most the weights again."""
    weights = sum(4 * v.model.num_parameters for v in plan.variants) * plan.options.seeds
    needed = 4 * 3 * weights + 6 * weights + 100_000_000
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise RyotError(
            f"output {run_dir}: {free / 1e6:.0f} MB free on the disk, expected about {needed / 1e6:.0f} MB",
            hint="make room, or choose another folder with -o",
        )


class _Run:
    def __init__(self, run_dir: Path, plan: RunPlan, settings: RunSettings, way_on: str):
        self.run_dir, self.plan, self.settings, self.way_on = run_dir, plan, settings, way_on
        self.options = plan.options
        self.targets: Sequence[Target] = plan.targets
        self.journal = Journal(run_dir)
        self.events = EventLog(run_dir / "events.jsonl")
        self.events.listeners += settings.listeners
        self.stages: list[dict[str, Any]] = []
        self.forms: list[FormFacts] = []

    def carry_through(self) -> Outcome:
        """All stages in order."""
        self.journal.open_run()
        dataset = self._prepare_data()
        results = self._train(dataset)
        if all(r.error for r in results):
            errors = "; ".join(str(r.error) for r in results)
            raise TrainingError(f"no variant finished training: {errors}", hint=self.way_on)
        measured, machine = self._measure()
        return self._conclude(
            Findings(
                plan=self.plan,
                command=self.settings.command,
                dataset=dataset,
                trainings=results,
                forms=self.forms,
                measured=measured,
                machine=machine,
                targets=self.targets,
                stages=self.stages,
            )
        )

    def close(self) -> None:
        self.events.close()
        self.journal.close()

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Tell that a stage begins and how it ended; what is put into the yielded dict as `detail` is told too."""
        self.events.emit(StageEvent(stage=name, status="begin"))
        begin = time.monotonic()
        said: dict[str, Any] = {"status": "end", "detail": ""}
        try:
            yield said
        except BaseException as error:
            detail = str(error) or type(error).__name__
            self.events.emit(StageEvent(stage=name, status="failed", wall_s=time.monotonic() - begin, detail=detail))
            raise
        wall_s = time.monotonic() - begin
        self.stages.append({"stage": name, "variant": "", "wall_s": round(wall_s, 3)})
        self.events.emit(StageEvent(stage=name, status=said["status"], wall_s=wall_s, detail=said["detail"]))

    # Data

    def _prepare_data(self) -> Dataset:
        with self._stage("data") as said:
            vocab_size = self.plan.variants[0].model.vocab_size
            corpus = load_corpus(self.options.data)
            dataset, cached = prepare_dataset(corpus, vocab_size, self.settings.cache_dir, on_progress=self._tell_data)
            for variant in self.plan.variants:
                dataset.check_sequences(variant.model.max_seq_len, variant.train.batch_size)
            said["status"] = "cached" if cached else "end"
            said["detail"] = f"{dataset.name}, {dataset.num_tokens['train'] / 1e6:.2f} M training tokens"
            if corpus.num_copies:
                said["detail"] += f", {corpus.num_copies} of {len(corpus.documents)} documents are copies"
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

    def _tell_data(self, detail: str) -> None:
        self.events.emit(StageEvent(stage="data", status="progress", detail=detail))

    # Training and export

    def _train(self, dataset: Dataset) -> list[TrainResult]:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.settings.cache_dir / "inductor"))
        with build_cluster(self.settings.cluster, log_dir=self.run_dir / "logs") as cluster:
            self._tune(cluster, dataset)
            jobs = [
                plan_job(
                    TrainJob(variant=variant, seed=seed, dataset_dir=str(dataset.path)),
                    self.plan.kernels[variant.name],
                    workers=self.options.workers_per_variant,
                )
                for variant in self.plan.variants
                for seed in range(self.options.seeds)
            ]
            if not all(self.journal.has_ended(j.key, j.digest) for j in jobs):
                self._open(cluster)
            exporter = Exporter(
                run_dir=self.run_dir,
                plan=self.plan,
                dataset=dataset,
                targets=self.targets,
                journal=self.journal,
                emit=self.events.emit,
            )
            with self._stage("train"):
                results = train_variants(
                    jobs,
                    cluster=cluster,
                    run_dir=self.run_dir,
                    journal=self.journal,
                    emit=self.events.emit,
                    options=self.settings.driver,
                    on_done=exporter,
                )
        self.forms, self.stages = exporter.forms, self.stages + exporter.stages
        return sorted(results, key=lambda r: ([v.name for v in self.plan.variants].index(r.variant), r.seed))

    def _open(self, cluster: Cluster) -> None:
        """Open the cluster and refuse at once what it can never do for this run."""
        if cluster.is_open:
            return
        with self._stage("cluster") as said:
            cluster.open()
            Placement(cluster).check_fits(Need(self.options.threads), self.options.workers_per_variant, "training")
            if not cluster.embedded:
                probe_nodes(cluster, [])
                find_node(cluster, self.settings.cluster.bench_label, threads_under(self.targets))
            nodes = cluster.nodes()
            said["detail"] = f"{len(nodes)} node, {sum(n.cpus for n in nodes):g} cores at {cluster.address}"

    def _tune(self, cluster: Cluster, dataset: Dataset) -> None:
        """Decide how every variant is trained and exported, before the first step, and write it down.

        A quick run is over before measuring could pay, so it takes the recipes' own kernels.
        """
        if self.plan.kernels:
            return
        if self.options.tune and not self.options.quick and any(v.tune for v in self.plan.variants):
            self._open(cluster)
        kernels: dict[str, KernelPlan] = {}
        inference: dict[str, ExportSettings] = {}
        cache_dir, threads = self.settings.cache_dir, self.options.threads
        with self._stage("tune") as said:
            for variant in self.plan.variants:
                if not (variant.tune and self.options.tune) or self.options.quick:
                    kernels[variant.name] = replace(variant.kernels, threads=threads)
                    continue
                training = tune_on_cluster(cluster, variant, dataset, cache_dir, threads=threads)
                export = choose_inference(variant.model.spec, cache_dir)
                kernels[variant.name] = training.plan
                inference[variant.name] = export.settings
                log.info("%s\n%s", format_training(variant.name, training), format_inference(export))
                said["status"] = "cached" if training.cached and export.cached else "end"
                said["detail"] = f"{variant.name} trains with {format_plan(training.plan)}"
        self.plan = replace(self.plan, kernels=kernels, inference=inference)
        write_atomically(self.run_dir / PLAN_FILE, plan_to_toml(self.plan))

    # Measurement

    def _measure(self) -> tuple[list[MeasureResult], dict[str, Any]]:
        """Measure every exported form, alone on the machine; forms that a gate stopped are measured and marked too."""
        joined, bench_on = self.settings.cluster.address is not None, self.settings.cluster.bench_label
        brief: dict[str, Any] = dict(QUICK_SPEC) if self.options.quick else {}
        if joined:
            brief["cores"] = threads_under(self.targets)  # the cores of the node that measures count, not of this one
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
        inputs = digest(asked, manifests, rounds, bench_on, ryot.__version__)
        file = self.run_dir / MEASURE_FILE
        with self._stage("measure") as said:
            if self.journal.find_stage("measure", "all", inputs) is not None and file.exists():
                said["status"] = "cached"
                values = json.loads(file.read_text())
                return [MeasureResult.from_mapping(r) for r in values["results"]], values["machine"]
            said["detail"] = f"{len(specs)} forms, {rounds} rounds"
            if joined and specs:
                measured = measure_on_cluster(
                    self.settings.cluster, specs, rounds=rounds, log_dir=self.run_dir / "logs"
                )
                results, machine = measured.results, measured.machine
                for result in results:
                    self._tell_measured(result)
                said["detail"] += f" on {measured.node}"
            else:
                machine = record_environment()
                results = measure_rounds(specs, rounds=rounds, on_result=self._tell_measured)
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

    def _conclude(self, findings: Findings) -> Outcome:
        """Judge, write report and bundle, and say how the run ended."""
        with self._stage("report"):
            report = build_run_report(self.run_dir, findings)
            write_outcome(self.run_dir, report)
        return Outcome(report, decide_exit_code(report, findings))


def format_plan(plan: Any) -> str:
    """A kernel plan in a few words."""
    parts = [f"attention {plan.attention}", plan.dtype, "compiled" if plan.compile else "eager"]
    parts.append(f"loss in chunks of {plan.loss_chunk}" if plan.loss_chunk else "loss whole")
    return ", ".join(parts)


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
