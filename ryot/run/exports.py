"""Export of trained variants while others still train: the best seed of each, gated and written into the run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence

import ryot
from ryot.config import digest
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_variant
from ryot.deploy.settings import ExportSettings
from ryot.errors import QualityError
from ryot.mapping import to_mapping
from ryot.models.sources.folder import open_folder
from ryot.report.rows import ExportedArtifact, StageTime
from ryot.run.context import RunContext
from ryot.run.export_record import ExportRecord, export_settings, loosest_bpb_ratio
from ryot.run.plan import RunPlan
from ryot.run.training import TrainResult
from ryot.train.dataset import Dataset


class Exporter:
    """Takes trainings as they end, in one thread; `artifacts` and `times` are complete when the last one has."""

    def __init__(self, context: RunContext, plan: RunPlan, datasets: Mapping[str, Dataset]):
        self.context, self.plan, self.datasets = context, plan, datasets
        self.max_bpb_ratio = loosest_bpb_ratio(plan)
        self.artifacts: list[ExportedArtifact] = []
        self.times: list[StageTime] = []
        self._ended: dict[str, list[TrainResult]] = {}

    def __call__(self, result: TrainResult) -> None:
        """Export the seed of lowest validation loss once all seeds of a variant have ended."""
        seeds = self._ended.setdefault(result.variant, [])
        seeds.append(result)
        if len(seeds) == self.plan.options.seeds:
            finished = [r for r in seeds if r.error is None and r.checkpoint]
            if finished:
                self._export(min(finished, key=_validation_loss))

    def _export(self, result: TrainResult) -> None:
        begin = time.monotonic()
        precisions = self.plan.precisions(result.variant)
        settings = export_settings(self.plan, result.variant)
        inputs = digest(result.sha256, precisions, settings, self.max_bpb_ratio, ryot.__version__)
        record = ExportRecord(
            self.context, result.variant, result.seed, self.plan.variant(result.variant).model.max_seq_len, inputs
        )
        artifacts = record.find_done()
        cached = artifacts is not None
        if artifacts is None:
            artifacts = self._export_now(result, precisions, settings, record)
        self.artifacts += artifacts
        self.times.append(record.tell_end(time.monotonic() - begin, cached=cached))

    def _export_now(
        self, result: TrainResult, precisions: Sequence[str], settings: ExportSettings, record: ExportRecord
    ) -> list[ExportedArtifact]:
        assert result.checkpoint is not None
        variant = self.plan.variant(result.variant)
        root = self.context.folder.artifacts(variant.name, result.seed)
        shutil.rmtree(root, ignore_errors=True)
        options = ExportOptions(
            name=f"ryot-{variant.name}",
            variant=variant.name,
            seed=result.seed,
            settings=settings,
            max_bpb_ratio=self.max_bpb_ratio,
            config=to_mapping(variant),
        )
        try:
            exported = export_variant(
                open_folder(result.checkpoint), root, precisions, self.datasets[variant.name], options=options
            )
        except QualityError as error:
            return record.refuse(precisions, error)
        return record.accept(exported, self.max_bpb_ratio)


def _validation_loss(result: TrainResult) -> tuple[float, int]:
    assert result.metrics.val_loss is not None, "a training that has ended was evaluated"
    return result.metrics.val_loss, result.seed
