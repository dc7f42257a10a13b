"""The stage that measures every exported artifact, alone on its machine, and what it leaves in the run folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import ryot
from ryot.artifact import ArtifactId
from ryot.atomic import write_atomically
from ryot.config import digest, replace
from ryot.deploy.remeasure import effort, spec_under, threads_under
from ryot.edge.bundle import load_bundle
from ryot.edge.protocol import MeasureResult, MeasureSpec
from ryot.events import MeasureEvent
from ryot.mapping import read_mapping, to_mapping
from ryot.report.rows import ExportedArtifact
from ryot.run.context import RunContext
from ryot.run.executor import Measured
from ryot.run.plan import RunPlan

#: Rounds of measurement in a quick run.
QUICK_ROUNDS = 3


def measure_artifacts(context: RunContext, plan: RunPlan, artifacts: Sequence[ExportedArtifact]) -> Measured:
    """Measure every exported artifact; those that a gate stopped are measured and marked too."""
    executor, folder = context.executor, context.folder
    bundles = {a.id: load_bundle(folder.path / a.path, verify=False) for a in artifacts if a.path}
    brief = effort(bundles.values(), quick=plan.options.quick)
    if executor.has_own_machines:
        brief["cores"] = threads_under(plan.targets)  # the cores of the node that measures count, not of this one
    specs = {artifact: spec_under(plan.targets, bundles[artifact], **brief) for artifact in sorted(bundles)}
    rounds = QUICK_ROUNDS if plan.options.quick else plan.options.rounds
    inputs = _digest_inputs(specs, rounds, executor.bench_label)
    with context.stage("measure") as note:
        known = context.journal.find_stage("measure", "all", inputs)
        if known is not None and folder.measurements.exists():
            note.status = "cached"
            return load_measurements(folder.measurements)
        measured = executor.measure(
            specs,
            rounds=rounds,
            log_dir=folder.logs,
            on_result=lambda artifact, result: context.events.emit(_event(artifact, result)),
        )
        note.detail = f"{len(specs)} artifacts, {rounds} rounds" + (f" on {measured.node}" if measured.node else "")
        save_measurements(measured, folder.measurements)
        context.journal.finish_stage("measure", "all", inputs)
    return measured


def save_measurements(measured: Measured, path: Path) -> None:
    """Keep raw results for a run that is resumed after this stage."""
    results = [
        {"variant": a.variant, "seed": a.seed, "precision": a.precision, **to_mapping(result, keep_none=True)}
        for a, found in measured.results.items()
        for result in found
    ]
    # `node` is in the machine's facts where there is one.
    write_atomically(path, json.dumps({"machine": measured.machine, "results": results}))


def load_measurements(path: Path) -> Measured:
    """What `save_measurements` kept, by this version or the one before, which had the artifact's name alone."""
    values = json.loads(path.read_text(encoding="utf-8"))
    results: dict[ArtifactId, list[MeasureResult]] = {}
    for entry in values["results"]:
        if "arm" in entry:
            artifact = ArtifactId.parse(entry["arm"])
        else:
            artifact = ArtifactId(entry["variant"], entry["seed"], entry["precision"])
        results.setdefault(artifact, []).append(read_mapping(MeasureResult, entry))
    return Measured(results=results, machine=values["machine"], node=values["machine"].get("node", ""))


def _digest_inputs(specs: Mapping[ArtifactId, MeasureSpec], rounds: int, bench_label: str) -> str:
    manifests = {str(artifact): load_bundle(Path(spec.bundle), verify=False).files for artifact, spec in specs.items()}
    # Where the run folder lies is no input: it may be moved and resumed.
    asked = {str(artifact): replace(spec, bundle="") for artifact, spec in specs.items()}
    return digest(asked, manifests, rounds, bench_label, ryot.__version__)


def _event(artifact: ArtifactId, result: MeasureResult) -> MeasureEvent:
    return MeasureEvent(
        case=str(artifact),
        round=result.round,
        ok=result.ok,
        ttft_ms=statistics.median(result.ttft_ms) if result.ttft_ms else None,
        decode_tok_s=statistics.median(result.decode_tok_s) if result.decode_tok_s else None,
        peak_rss_bytes=result.peak_rss_bytes,
        reason=result.reason,
    )
