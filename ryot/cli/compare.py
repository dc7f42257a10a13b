"""`ryot-deploy compare`: two runs, bundles or report files, from their records or measured side by side now."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.options import HELP, format_option, verbose_option
from ryot.config import DEFAULT_ROUNDS, DEFAULT_TARGET

if TYPE_CHECKING:
    from ryot.report.rows import ExportedArtifact
    from ryot.report.table import Format

_EXISTING = click.Path(exists=True, path_type=Path)


@click.command("compare", context_settings=HELP)
@click.argument("a", type=_EXISTING)
@click.argument("b", type=_EXISTING)
@click.option("--artifact-a", metavar="NAME", help="Artifact of A as VARIANT/PRECISION  [default: all that both have]")
@click.option("--artifact-b", metavar="NAME", help="Artifact of B as VARIANT/PRECISION")
@click.option("--measure", is_flag=True, help="Measure both now, interleaved, instead of reading their records")
@click.option(
    "--target",
    metavar="NAME",
    multiple=True,
    default=(DEFAULT_TARGET,),
    show_default=True,
    help="Limits to measure under",
)
@click.option(
    "--rounds",
    metavar="N",
    type=click.IntRange(min=1),
    default=DEFAULT_ROUNDS,
    show_default=True,
    help="Rounds of measurement",
)
@format_option("table", "md", "csv", "json")
@verbose_option
def command(
    a: Path,
    b: Path,
    artifact_a: str | None,
    artifact_b: str | None,
    measure: bool,
    target: tuple[str, ...],
    rounds: int,
    fmt: Format,
) -> None:
    """Compare two runs, bundles or report files: ratios A/B with intervals, `no difference` where they hold 1.

    Example: ryot-deploy compare runs/a/bundle runs/b/bundle --measure
    """
    from ryot.report.compare import compare_reports, render_comparison

    if measure:
        from ryot.deploy.remeasure import find_artifacts, measure_together
        from ryot.report.rows import has_report, load_report
        from ryot.report.targets import load_targets

        groups = [_pick(find_artifacts(path), name) for path, name in ((a, artifact_a), (b, artifact_b))]
        reports = measure_together(
            groups,
            load_targets(target),
            rounds=rounds,
            command=" ".join(["ryot-deploy", *sys.argv[1:]]),
            on_result=lambda case, r: click.echo(f"round {r.round + 1} {case}", err=True),
        )
        for i, path in enumerate((a, b)):
            if has_report(path):
                known = load_report(path)
                reports[i] = dataclasses.replace(reports[i], corpus=known.corpus, variants=known.variants)
    else:
        from ryot.report.rows import load_report

        reports = [load_report(a), load_report(b)]
    click.echo(render_comparison(compare_reports(*reports, name_a=artifact_a, name_b=artifact_b), fmt))


def _pick(artifacts: list[ExportedArtifact], name: str | None) -> list[ExportedArtifact]:
    from ryot.errors import ConfigError
    from ryot.mapping import unknown

    if name is None:
        return artifacts
    found = [a for a in artifacts if f"{a.variant}/{a.precision}" == name]
    if not found:
        raise ConfigError(unknown("artifact", name, [f"{a.variant}/{a.precision}" for a in artifacts]))
    return found
