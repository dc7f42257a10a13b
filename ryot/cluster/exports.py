"""Export of trained variants while others still train: the best seed of each, gated and written into the run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ryot
from ryot.cluster.jobs import TrainResult
from ryot.cluster.journal import Journal
from ryot.config import digest, replace, to_mapping
from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import ArtifactResult, export_variant
from ryot.deploy.quality import MAX_BPB_RATIO
from ryot.deploy.settings import ExportSettings, dynamic_bits
from ryot.errors import QualityError
from ryot.events import Event, GateEvent, StageEvent, StageStatus
from ryot.models.sources.folder import open_folder
from ryot.plan import RunPlan
from ryot.report.build import FormFacts
from ryot.report.targets import Target
from ryot.train.dataset import Dataset


class Exporter:
    """Takes trainings as they end, in one thread; `forms` and `stages` are complete when the last one has."""

    def __init__(
        self,
        *,
        run_dir: Path,
        plan: RunPlan,
        dataset: Dataset,
        targets: Sequence[Target],
        journal: Journal,
        emit: Callable[[Event], None],
    ):
        self.run_dir, self.plan, self.dataset = run_dir, plan, dataset
        self.targets, self.journal, self.emit = targets, journal, emit
        self.max_bpb_ratio = max(t.limits.get("bpb_ratio", MAX_BPB_RATIO) for t in targets)
        """The loosest limit of any target; a stricter one shows in that target's verdict."""
        self.forms: list[FormFacts] = []
        self.stages: list[dict[str, Any]] = []
        self._ended: dict[str, list[TrainResult]] = {}

    def __call__(self, result: TrainResult) -> None:
        """Export the seed of lowest validation loss once all seeds of a variant have ended."""
        seeds = self._ended.setdefault(result.variant, [])
        seeds.append(result)
        if len(seeds) == self.plan.options.seeds:
            finished = [r for r in seeds if r.error is None and r.checkpoint]
            if finished:
                self._export(min(finished, key=lambda r: (r.facts["val_loss"], r.seed)))

    def _export(self, result: TrainResult) -> None:
        begin = time.monotonic()
        precisions = self.plan.precisions(result.variant)
        settings = self._settings(result.variant)
        inputs = digest(result.sha256, precisions, settings, self.max_bpb_ratio, ryot.__version__)
        key = f"{result.variant}/seed-{result.seed}"
        known = self.journal.find_stage("export", key, inputs)
        if known and all((self.run_dir / f["path"]).is_dir() for f in known["forms"] if f["path"]):
            forms = [FormFacts(**f) for f in known["forms"]]
        else:
            known, forms = None, self._export_now(result, precisions, settings)
            self.journal.finish_stage("export", key, inputs, forms=[to_mapping(f) for f in forms])
        self.forms += forms
        wall_s = time.monotonic() - begin
        self.stages.append({"stage": "export", "variant": result.variant, "wall_s": round(wall_s, 3)})
        status: StageStatus = "cached" if known else "end"
        self.emit(StageEvent(stage="export", status=status, variant=result.variant, seed=result.seed, wall_s=wall_s))

    def _export_now(self, result: TrainResult, precisions: Sequence[str], settings: ExportSettings) -> list[FormFacts]:
        assert result.checkpoint is not None
        variant = self.plan.variant(result.variant)
        root = self.run_dir / "variants" / variant.name / f"seed-{result.seed}" / "forms"
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
            self._gate(result, "parity", passed=False, detail=str(error))
            return [
                FormFacts(
                    variant=variant.name, seed=result.seed, precision=p, size_bytes=0, passed=False, reason=str(error)
                )
                for p in precisions
            ]
        parity = exported[0].parity
        self._gate(result, "parity", passed=True, value=parity.max_difference, limit=parity.tolerance)
        return [self._facts(result, form) for form in exported]

    def _facts(self, result: TrainResult, form: ArtifactResult) -> FormFacts:
        self._gate(
            result,
            f"quality {form.precision}",
            passed=form.passed,
            value=form.quality.bpb_ratio,
            limit=self.max_bpb_ratio,
            detail=form.reason,
        )
        return FormFacts(
            variant=result.variant,
            seed=result.seed,
            precision=form.precision,
            size_bytes=form.size_bytes,
            context_tokens=self.plan.variant(result.variant).model.max_seq_len,
            quality=form.quality.as_dict(),
            passed=form.passed,
            reason=form.reason,
            path=form.path.relative_to(self.run_dir).as_posix(),
        )

    def _settings(self, variant: str) -> ExportSettings:
        # A target without a device is this machine; an artifact must hold on each of them.
        bits = dynamic_bits(t.device.isa if t.device else None for t in self.targets)
        return replace(self.plan.inference.get(variant, ExportSettings()), dynamic_bits=bits)

    def _gate(self, result: TrainResult, gate: str, *, passed: bool, **facts: Any) -> None:
        values = {"value": 0.0, "limit": 0.0, **facts}
        self.emit(GateEvent(variant=result.variant, seed=result.seed, gate=gate, passed=passed, **values))
