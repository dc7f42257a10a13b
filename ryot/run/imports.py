"""What a run does about models that exist: which exports are to be done, and what becomes of each."""

from __future__ import annotations

import time
from dataclasses import dataclass

import ryot
from ryot.config import digest, replace
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import ArtifactResult
from ryot.errors import QualityError, RyotError
from ryot.events import StageEvent, StageStatus
from ryot.report.rows import ExportedArtifact, StageTime
from ryot.run.context import RunContext
from ryot.run.export_record import ExportRecord, export_settings, loosest_bpb_ratio
from ryot.run.import_job import ImportJob, ImportListener
from ryot.run.inputs import ImportedModel, RunInputs
from ryot.run.journal import AttemptBegun, TrainingFailed
from ryot.run.plan import RunPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportResult:
    """How the export of a model ended."""

    model: ImportedModel
    artifacts: list[ExportedArtifact]
    error: RyotError | None = None
    """Why there are none."""


class Importer(ImportListener):
    """The exports of a plan's models: `jobs` are those to do, and whoever does them tells it what becomes of them."""

    def __init__(self, context: RunContext, plan: RunPlan, inputs: RunInputs):
        self.context = context
        self.max_bpb_ratio = loosest_bpb_ratio(plan)
        self.times: list[StageTime] = []
        self.jobs: list[ImportJob] = []
        self._models = inputs.models
        self._records: dict[str, ExportRecord] = {}
        self._begun: dict[str, float] = {}
        self._results: dict[str, ImportResult] = {}
        for model in inputs.models:
            name, settings = model.config.name, export_settings(plan, model.config.name)
            precisions = plan.precisions(name)
            digested = digest(
                model.sha256, inputs.corpus_sha256, model.config.context, precisions, settings, self.max_bpb_ratio,
                ryot.__version__,
            )  # fmt: skip
            record = self._records[name] = ExportRecord(context, name, 0, model.spec.max_seq_len, digested)
            known = record.find_done()
            if known is not None:
                self._results[name] = ImportResult(model=model, artifacts=known)
                self.times.append(record.tell_end(0.0, cached=True))
                continue
            options = ExportOptions(
                name=name,
                variant=name,
                settings=settings,
                context=model.config.context or None,
                oracle=True,
                max_bpb_ratio=self.max_bpb_ratio,
            )
            self.jobs.append(
                ImportJob(
                    name=name,
                    source=model.source,
                    sha256=model.sha256,
                    data=plan.options.data,
                    corpus_sha256=inputs.corpus_sha256,
                    precisions=precisions,
                    options=options,
                    artifacts=context.folder.artifacts(name, 0).absolute(),
                    cost=model.spec.num_parameters,
                )
            )

    def results(self) -> list[ImportResult]:
        """One result per model, in the plan's order; complete when all jobs are done."""
        return [self._results[model.config.name] for model in self._models]

    def begun(self, job: ImportJob, where: str) -> None:
        record = self._records[job.name]
        attempt = self.context.journal.next_attempt(record.key)
        self.context.journal.append(AttemptBegun(key=record.key, digest=record.digest, attempt=attempt, node=where))
        self._begun.setdefault(job.name, time.monotonic())
        self._tell(job, "begin", f"on {where}, attempt {attempt}")

    def told(self, job: ImportJob, detail: str) -> None:
        self._tell(job, "progress", detail)

    def lost(self, job: ImportJob, reason: str) -> None:
        self._tell(job, "lost", reason)

    def done(self, job: ImportJob, exported: list[ArtifactResult]) -> None:
        own = self.context.folder.artifacts(job.name, 0)
        # The run folder by the name that this process has for it.
        here = [replace(result, path=own / result.path.name) for result in exported]
        self._end(job, self._records[job.name].accept(here, self.max_bpb_ratio))

    def failed(self, job: ImportJob, error: RyotError) -> None:
        """A gate that was breached is a result; anything else is tried again when the run is resumed."""
        record = self._records[job.name]
        if isinstance(error, QualityError):
            self._end(job, record.refuse(job.precisions, error))
            return
        self.context.journal.append(
            TrainingFailed(key=record.key, digest=record.digest, reason=str(error), final=False)
        )
        self._tell(job, "failed", str(error))
        self._results[job.name] = ImportResult(model=self._model(job), artifacts=[], error=error)

    def _end(self, job: ImportJob, artifacts: list[ExportedArtifact]) -> None:
        self._results[job.name] = ImportResult(model=self._model(job), artifacts=artifacts)
        wall_s = time.monotonic() - self._begun[job.name]
        self.times.append(self._records[job.name].tell_end(wall_s, cached=False))

    def _model(self, job: ImportJob) -> ImportedModel:
        return next(model for model in self._models if model.config.name == job.name)

    def _tell(self, job: ImportJob, status: StageStatus, detail: str) -> None:
        self.context.events.emit(StageEvent(stage="export", status=status, variant=job.name, detail=detail))
