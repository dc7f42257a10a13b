"""What an export leaves in journal and events, of a variant that was trained or of a model that was imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ryot.config import replace
from ryot.deploy.export import ArtifactResult
from ryot.deploy.quality import MAX_BPB_RATIO
from ryot.deploy.settings import ExportSettings, dynamic_bits
from ryot.errors import OracleError, QualityError
from ryot.events import GateEvent, StageEvent
from ryot.mapping import read_mapping, to_mapping
from ryot.report.rows import ExportedArtifact, StageTime
from ryot.run.context import RunContext
from ryot.run.plan import RunPlan


def loosest_bpb_ratio(plan: RunPlan) -> float:
    """The quality limit of the exports: the loosest of any target. A stricter one shows in that target's verdict."""
    return max(t.limits.get("bpb_ratio", MAX_BPB_RATIO) for t in plan.targets)


def export_settings(plan: RunPlan, variant: str) -> ExportSettings:
    """How the artifacts of a variant are made."""
    # A target without a device is this machine; an artifact must hold on each of them.
    bits = dynamic_bits(t.device.isa if t.device else None for t in plan.targets)
    return replace(plan.inference.get(variant, ExportSettings()), dynamic_bits=bits)


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """The export of one variant, done once for inputs of this digest."""

    context: RunContext
    variant: str
    seed: int
    context_tokens: int
    digest: str

    @property
    def key(self) -> str:
        """What the journal calls it."""
        return f"{self.variant}/seed-{self.seed}"

    def find_done(self) -> list[ExportedArtifact] | None:
        """What an earlier driver exported from the same inputs, if all of it is still there."""
        known = self.context.journal.find_stage("export", self.key, self.digest)
        if known is None:
            return None
        # The version before called them forms.
        kept = known["artifacts"] if "artifacts" in known else known["forms"]
        artifacts = [read_mapping(ExportedArtifact, a) for a in kept]
        return artifacts if all((self.context.folder.path / a.path).is_dir() for a in artifacts if a.path) else None

    def accept(self, exported: Sequence[ArtifactResult], max_bpb_ratio: float) -> list[ExportedArtifact]:
        """Make artifacts count, and tell what their gates said."""
        parity, oracle = exported[0].parity, exported[0].oracle
        self._tell_gate("parity", passed=True, value=parity.max_difference, limit=parity.tolerance)
        if oracle.oracle:
            self._tell_gate(
                "oracle", passed=True, value=oracle.max_difference, limit=oracle.tolerance, detail=oracle.oracle
            )
        for done in exported:
            self._tell_gate(
                f"quality {done.precision}",
                passed=done.passed,
                value=done.quality.bpb_ratio,
                limit=max_bpb_ratio,
                detail=done.reason,
            )
        return self._finish(
            [
                ExportedArtifact(
                    variant=self.variant,
                    seed=self.seed,
                    precision=done.precision,
                    size_bytes=done.size_bytes,
                    context_tokens=self.context_tokens,
                    quality=to_mapping(done.quality, keep_none=True),
                    passed=done.passed,
                    reason=done.reason,
                    path=self.context.folder.relative(done.path),
                )
                for done in exported
            ]
        )

    def refuse(self, precisions: Sequence[str], error: QualityError) -> list[ExportedArtifact]:
        """Rows of artifacts that were not made, because nothing that this reading gives can be trusted."""
        gate = "oracle" if isinstance(error, OracleError) else "parity"
        self._tell_gate(gate, passed=False, detail=str(error))
        return self._finish(
            [
                ExportedArtifact(
                    variant=self.variant, seed=self.seed, precision=p, size_bytes=0, passed=False, reason=str(error)
                )
                for p in precisions
            ]
        )

    def tell_end(self, wall_s: float, *, cached: bool) -> StageTime:
        """Tell that the export is over; returns its time."""
        self.context.events.emit(
            StageEvent(
                stage="export",
                status="cached" if cached else "end",
                variant=self.variant,
                seed=self.seed,
                wall_s=wall_s,
            )
        )
        return StageTime(stage="export", variant=self.variant, wall_s=round(wall_s, 3))

    def _finish(self, artifacts: list[ExportedArtifact]) -> list[ExportedArtifact]:
        kept = [to_mapping(a) for a in artifacts]
        self.context.journal.finish_stage("export", self.key, self.digest, artifacts=kept)
        return artifacts

    def _tell_gate(
        self, gate: str, *, passed: bool, value: float | None = 0.0, limit: float = 0.0, detail: str = ""
    ) -> None:
        self.context.events.emit(
            GateEvent(
                variant=self.variant,
                seed=self.seed,
                gate=gate,
                passed=passed,
                value=value,
                limit=limit,
                detail=detail,
            )
        )
