"""What devices measured, as rows of a report: one per device, judged as that device."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from ryot.deploy.remeasure import find_artifacts
from ryot.edge.bundle import Bundle
from ryot.edge.protocol import MeasureResult
from ryot.errors import ConfigError
from ryot.report.build import build_report
from ryot.report.rows import Report, has_report, load_report
from ryot.report.targets import Target, cpu_name


def judge_device(
    bundle: Bundle,
    device: str,
    results: Sequence[MeasureResult],
    targets: Sequence[Target],
    machine: Mapping[str, Any],
    command: str,
) -> Report:
    """The report of one device: its row, and the verdicts of `targets` about it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = own_record(bundle)
    [artifact] = [dataclasses.replace(a, device=device, path="") for a in find_artifacts(bundle.path)]
    report = build_report(
        run_id=f"pushed-{now}",
        command=command,
        artifacts=[artifact],
        results={artifact.id: results},
        targets=targets,
        machine=machine,
        corpus={} if record is None else record.corpus,
        variants=() if record is None else record.variants,
        created_at=now,
    )
    # It is on its device already: nothing is to be chosen.
    rows = tuple(dataclasses.replace(row, chosen=False, pareto=False) for row in report.rows)
    return dataclasses.replace(report, rows=rows, choice=None, devices={device: machine})


def join_reports(reports: Sequence[Report]) -> Report:
    """One report of several devices'. No ratios: they were not measured by turns, nor on one machine."""
    first = reports[0]
    if len(reports) == 1:
        return first
    targets = {str(t["name"]): t for report in reports for t in report.targets}
    return dataclasses.replace(
        first,
        machine={},
        devices={name: machine for report in reports for name, machine in report.devices.items()},
        targets=tuple(targets.values()),
        rows=tuple(row for report in reports for row in report.rows),
        verdicts=tuple(verdict for report in reports for verdict in report.verdicts),
        comparisons=(),
        baseline="",
        notes=tuple(f"{device}: {note}" for report in reports for device in report.devices for note in report.notes),
    )


def describe_devices(report: Report) -> list[str]:
    """A line for each device: what its CPU is."""
    return [f"{name}: {cpu_name(machine)}" for name, machine in report.devices.items()]


def own_record(bundle: Bundle) -> Report | None:
    """What was found out about a bundle when it was made; None where it has no record, or none that can be read."""
    try:
        return load_report(bundle.path) if has_report(bundle.path) else None
    except ConfigError:
        return None


def own_peak_bytes(bundle: Bundle) -> int | None:
    """The memory that a bundle took where it was measured last; None where its record does not say."""
    record = own_record(bundle)
    return None if record is None else max((r.peak_rss_bytes for r in record.rows if r.peak_rss_bytes), default=None)
