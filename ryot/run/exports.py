"""Export of trained variants while others still train: the best seed of each, gated and written into the run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence

import ryot
from ryot.config import digest, replace
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import ArtifactResult, export_variant
from ryot.deploy.quality import MAX_BPB_RATIO
from ryot.deploy.settings import ExportSettings, dynamic_bits
from ryot.errors import QualityError
from ryot.events import GateEvent, StageEvent
from ryot.mapping import read_mapping, to_mapping
from ryot.models.sources.folder import open_folder
from ryot.report.rows import ExportedArtifact, StageTime
from ryot.run.context import RunContext
from ryot.run.plan import RunPlan
from ryot.run.training import TrainResult
from ryot.train.dataset import Dataset


class Exporter:
    """Takes trainings as they end, in one thread; `artifacts` and `times` are complete when the last one has."""

    def __init__(self, context: RunContext, plan: RunPlan, dataset: Dataset):
        self.context, self.plan, self.dataset = context, plan, dataset
        self.max_bpb_ratio = max(t.limits.get("bpb_ratio", MAX_BPB_RATIO) for t in plan.targets)
        """The loosest limit of any target; a stricter one shows in that target's verdict."""
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
        journal, emit = self.context.journal, self.context.events.emit
        precisions = self.plan.precisions(result.variant)
        settings = self._settings(result.variant)
        inputs = digest(result.sha256, precisions, settings, self.max_bpb_ratio, ryot.__version__)
        key = f"{result.variant}/seed-{result.seed}"
        artifacts = self._find_done(key, inputs)
        cached = artifacts is not None
        if artifacts is None:
            artifacts = self._export_now(result, precisions, settings)
            journal.finish_stage("export", key, inputs, artifacts=[to_mapping(a) for a in artifacts])
        self.artifacts += artifacts
        wall_s = time.monotonic() - begin
        self.times.append(StageTime(stage="export", variant=result.variant, wall_s=round(wall_s, 3)))
        emit(
            StageEvent(
                stage="export",
                status="cached" if cached else "end",
                variant=result.variant,
                seed=result.seed,
                wall_s=wall_s,
            )
        )

    def _find_done(self, key: str, inputs: str) -> list[ExportedArtifact] | None:
        """What an earlier driver exported from the same inputs, if all of it is still there."""
        known = self.context.journal.find_stage("export", key, inputs)
        if known is None:
            return None
        # The version before called them forms.
        kept = known["artifacts"] if "artifacts" in known else known["forms"]
        artifacts = [read_mapping(ExportedArtifact, a) for a in kept]
        return artifacts if all((self.context.folder.path / a.path).is_dir() for a in artifacts if a.path) else None

    def _export_now(
        self, result: TrainResult, precisions: Sequence[str], settings: ExportSettings
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
            exported = export_variant(open_folder(result.checkpoint), root, precisions, self.dataset, options=options)
        except QualityError as error:
            self._tell_gate(result, "parity", passed=False, detail=str(error))
            return [
                ExportedArtifact(
                    variant=variant.name, seed=result.seed, precision=p, size_bytes=0, passed=False, reason=str(error)
                )
                for p in precisions
            ]
        parity = exported[0].parity
        self._tell_gate(result, "parity", passed=True, value=parity.max_difference, limit=parity.tolerance)
        return [self._take_in(result, done) for done in exported]

    def _take_in(self, result: TrainResult, done: ArtifactResult) -> ExportedArtifact:
        self._tell_gate(
            result,
            f"quality {done.precision}",
            passed=done.passed,
            value=done.quality.bpb_ratio,
            limit=self.max_bpb_ratio,
            detail=done.reason,
        )
        return ExportedArtifact(
            variant=result.variant,
            seed=result.seed,
            precision=done.precision,
            size_bytes=done.size_bytes,
            context_tokens=self.plan.variant(result.variant).model.max_seq_len,
            quality=done.quality.as_dict(),
            passed=done.passed,
            reason=done.reason,
            path=self.context.folder.relative(done.path),
        )

    def _settings(self, variant: str) -> ExportSettings:
        # A target without a device is this machine; an artifact must hold on each of them.
        bits = dynamic_bits(t.device.isa if t.device else None for t in self.plan.targets)
        return replace(self.plan.inference.get(variant, ExportSettings()), dynamic_bits=bits)

    def _tell_gate(
        self,
        result: TrainResult,
        gate: str,
        *,
        passed: bool,
        value: float | None = 0.0,
        limit: float = 0.0,
        detail: str = "",
    ) -> None:
        self.context.events.emit(
            GateEvent(
                variant=result.variant,
                seed=result.seed,
                gate=gate,
                passed=passed,
                value=value,
                limit=limit,
                detail=detail,
            )
        )


def _validation_loss(result: TrainResult) -> tuple[float, int]:
    assert result.metrics.val_loss is not None, "a training that has ended was evaluated"
    return result.metrics.val_loss, result.seed
