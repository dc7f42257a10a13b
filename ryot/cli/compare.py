"""`ryot-deploy compare`: two runs, bundles or report files, from their records or measured side by side now."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from ryot.cli.options import HELP, format_option, verbose_option

_EXISTING = click.Path(exists=True, path_type=Path)


@click.command("compare", context_settings=HELP)
@click.argument("a", type=_EXISTING)
@click.argument("b", type=_EXISTING)
@click.option("--form-a", metavar="NAME", help="Form of A as VARIANT/PRECISION  [default: all that both have]")
@click.option("--form-b", metavar="NAME", help="Form of B as VARIANT/PRECISION")
@click.option("--measure", is_flag=True, help="Measure both now, interleaved, instead of reading their records")
@click.option(
    "--target", metavar="NAME", multiple=True, default=("phase1",), show_default=True, help="Limits to measure under"
)
@click.option(
    "--rounds", metavar="N", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of measurement"
)
@format_option("table", "md", "csv", "json")
@verbose_option
def command(
    a: Path,
    b: Path,
    form_a: str | None,
    form_b: str | None,
    measure: bool,
    target: tuple[str, ...],
    rounds: int,
    fmt: Any,
) -> None:
    """Compare two runs, bundles or report files: ratios A/B with intervals, `no difference` where they hold 1.

    Example: ryot-deploy compare runs/a/bundle runs/b/bundle --measure
    """
    from ryot.report.compare import compare_reports, render_comparison

    if measure:
        from ryot.deploy.remeasure import find_forms, measure_together
        from ryot.report.rows import load_report
        from ryot.report.targets import load_targets

        groups = [_pick(find_forms(path), form) for path, form in ((a, form_a), (b, form_b))]
        reports = measure_together(
            groups,
            load_targets(target),
            rounds=rounds,
            command=" ".join(["ryot-deploy", *sys.argv[1:]]),
            on_result=lambda r: click.echo(f"round {r.round + 1} {'AB'[int(r.arm[0])]} {r.arm[2:]}", err=True),
        )
        for i, path in enumerate((a, b)):
            if path.is_file() or (path / "report.json").exists() or (path / "record.json").exists():
                known = load_report(path)
                reports[i] = dataclasses.replace(reports[i], corpus=known.corpus, variants=known.variants)
    else:
        from ryot.report.rows import load_report

        reports = [load_report(a), load_report(b)]
    click.echo(render_comparison(compare_reports(*reports, form_a=form_a, form_b=form_b), fmt))


def _pick(forms: list[Any], name: str | None) -> list[Any]:
    from ryot.config import unknown
    from ryot.errors import ConfigError

    if name is None:
        return forms
    found = [f for f in forms if f"{f.variant}/{f.precision}" == name]
    if not found:
        raise ConfigError(unknown("form", name, [f"{f.variant}/{f.precision}" for f in forms]))
    return found
