"""Artifacts measured under the limits of targets: those of a run as it goes, or of finished runs and bundles again."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ryot.artifact import ArtifactId
from ryot.edge.bundle import MANIFEST_NAME, Bundle, load_bundle
from ryot.edge.measure import build_spec, measure_rounds, record_environment
from ryot.edge.protocol import MeasureResult, MeasureSpec
from ryot.errors import ConfigError
from ryot.report.build import build_report
from ryot.report.rows import ExportedArtifact, Report, find_report, load_report
from ryot.report.targets import Target

#: What a quick run's measuring processes do less of than `MeasureSpec` says.
QUICK_SPEC: dict[str, Any] = {"min_runs": 5, "min_time_s": 0.2}
#: Bytes from which a bundle's run takes seconds: fewer of them do, in every case of a round, and more time is given.
#: SmolLM2-135M at int8 (140 MB) had not done 8 runs of 512 tokens after 120 s on a busy core.
LARGE_BUNDLE_BYTES = 64_000_000
LARGE_SPEC: dict[str, Any] = {"min_runs": 5, "timeout_s": 900.0}


def threads_under(targets: Sequence[Target]) -> int:
    """Threads of a measurement that several targets share: the fewest of any, and 1 without a target."""
    return min((t.threads for t in targets), default=1)


def effort(bundles: Iterable[Bundle], *, quick: bool) -> dict[str, Any]:
    """What bundles that are measured together do otherwise than `MeasureSpec` says, the same for all of them."""
    large = any(bundle.size_bytes > LARGE_BUNDLE_BYTES for bundle in bundles)
    return {**(QUICK_SPEC if quick else {}), **(LARGE_SPEC if large else {})}


def spec_under(targets: Sequence[Target], bundle: Bundle, *, cores: int | None = None, **overrides: Any) -> MeasureSpec:
    """The measurement of a bundle under the limits of `targets`, on `cores` cores (as many as this process may use).

    Several targets share one measurement: see `limits_under`.
    """
    return build_spec(bundle, **limits_under(targets, cores or len(os.sched_getaffinity(0))), **overrides)


def limits_under(targets: Sequence[Target], cores: int) -> dict[str, Any]:
    """`threads` and `memory_limit_bytes` of a measurement that several targets share, on so many cores.

    The fewest threads of any, and the largest memory limit, which an artifact has to outgrow to fail them all; smaller
    limits are compared with the peak.
    """
    limits = [t.memory_limit_bytes for t in targets if t.memory_limit_bytes]
    return {
        "threads": min(cores, threads_under(targets)),
        "memory_limit_bytes": max(limits) if limits else None,
    }


def find_artifacts(path: Path) -> list[ExportedArtifact]:
    """The measurable artifacts of a run folder, a report file in one, or a bundle; paths are those of their folders.

    Raises `ConfigError` when there are none, `BundleError` for a damaged bundle.
    """
    if (path / MANIFEST_NAME).exists():
        bundle = load_bundle(path)
        quality = bundle.manifest.get("quality") or {}
        return [
            ExportedArtifact(
                variant=bundle.variant or bundle.name,
                seed=bundle.seed,
                precision=bundle.precision,
                size_bytes=bundle.size_bytes,
                context_tokens=bundle.model.context_length,
                quality={k: quality.get(k) for k in ("kl", "top1", "bpb", "bpb_ratio")},
                path=str(path),
            )
        ]
    root = find_report(path).parent
    names = [f.name for f in dataclasses.fields(ExportedArtifact)]
    known = [ExportedArtifact(**{n: getattr(row, n) for n in names}) for row in load_report(path).rows if row.path]
    if missing := [f for f in known if not (root / f.path).is_dir()]:
        raise ConfigError(f"{path}: artifact {missing[0].path} is gone, so it cannot be measured again")
    if not known:
        raise ConfigError(f"{path}: names no exported artifact", hint="give a run folder or a bundle")
    bundles = [load_bundle(root / f.path) for f in known]
    return [
        dataclasses.replace(f, path=str(bundle.path), size_bytes=bundle.size_bytes) for f, bundle in zip(known, bundles)
    ]


class GroupCase(NamedTuple):
    """An artifact of one of the groups that are measured together."""

    group: int
    artifact: ArtifactId

    def __str__(self) -> str:
        return f"{'AB'[self.group] if self.group < 2 else self.group} {self.artifact}"


def measure_together(
    groups: Sequence[Sequence[ExportedArtifact]],
    targets: Sequence[Target],
    *,
    rounds: int,
    command: str,
    quick: bool = False,
    on_result: Callable[[GroupCase, MeasureResult], None] | None = None,
) -> list[Report]:
    """One report per group, all groups measured in the same interleaved rounds, so that their ratios are paired.

    `quick` measures as briefly as a quick run does.
    """
    bundles = {
        GroupCase(number, artifact.id): load_bundle(Path(artifact.path))
        for number, artifacts in enumerate(groups)
        for artifact in artifacts
    }
    brief = effort(bundles.values(), quick=quick)
    specs = {case: spec_under(targets, bundle, **brief) for case, bundle in bundles.items()}
    machine = record_environment()
    results = measure_rounds(specs, rounds=rounds, on_result=on_result)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return [
        build_report(
            run_id=f"measured-{now}",
            command=command,
            artifacts=artifacts,
            results={case.artifact: found for case, found in results.items() if case.group == number},
            targets=targets,
            machine=machine,
            corpus={},
            created_at=now,
        )
        for number, artifacts in enumerate(groups)
    ]
