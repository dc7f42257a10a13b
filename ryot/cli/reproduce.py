"""`ryot-deploy reproduce`: measure a report's artifacts again and say whether the figures agree."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.options import HELP, format_option, verbose_option

if TYPE_CHECKING:
    from ryot.report.table import Format


@click.command("reproduce", context_settings=HELP)
@click.argument("report", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", metavar="N", type=click.IntRange(min=1), help="Rounds  [default: as many as the report has]")
@format_option("table", "md", "csv", "json")
@verbose_option
def command(report: Path, rounds: int | None, fmt: Format) -> int:
    """Measure every artifact of a run (or a bundle) again, as it was measured, and compare with its report.

    Ends with exit code 0 when the figures agree, 1 when one does not.

    Example: ryot-deploy reproduce runs/first
    """
    from ryot.deploy.remeasure import find_artifacts, measure_together
    from ryot.report.reproduce import check_reproduced, render_reproduction
    from ryot.report.rows import load_report
    from ryot.report.targets import build_target

    old = load_report(report)
    targets = [build_target(t["name"], t, f"{report}: targets") for t in old.targets]
    (new,) = measure_together(
        [find_artifacts(report)],
        targets,
        quick=old.quick,
        rounds=rounds or max(row.runs for row in old.rows),
        command=" ".join(["ryot-deploy", *sys.argv[1:]]),
        on_result=lambda case, r: click.echo(f"round {r.round + 1} {case.artifact}", err=True),
    )
    found = check_reproduced(old, new)
    click.echo(render_reproduction(found, fmt))
    return 0 if found.agrees else 1
