"""`ryot-deploy cluster-run`: the main job."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryot.cli.generated import build_given, flag_of, given_values, is_given, options_from
from ryot.cli.options import HELP, cache_dir, check_output_folder, format_option, verbose_option
from ryot.cluster.options import ClusterOptions, DriverOptions
from ryot.run.options import RunOptions

if TYPE_CHECKING:
    from ryot.report.table import Format
    from ryot.run.plan import RunPlan


@click.command("cluster-run", context_settings=HELP)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Run folder to make  [default: runs/DATE-TIME-PRESET]",
)
@click.option("--resume", metavar="DIR", type=click.Path(path_type=Path), help="Resume a run that was stopped")
@options_from(RunOptions)
@click.option(
    "--config", metavar="FILE", type=click.Path(path_type=Path), help="TOML file with these options as keys; flags win"
)
@options_from(ClusterOptions)
@options_from(DriverOptions)
@format_option("table", "md", "csv", "json")
@click.option("--dry-run", is_flag=True, help="Print the resolved plan as TOML and stop")
@verbose_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    output: Path | None,
    resume: Path | None,
    config: Path | None,
    fmt: Format,
    dry_run: bool,
    **_: object,
) -> int:
    """Train recipes in parallel, take in models, export, measure, judge, and bundle the best artifact.

    The table goes to stdout, progress to stderr; report and bundle lie in the run folder. Exit code 0: every target
    met; 1: something failed; 3: a target missed or inconclusive; 4: a quality gate failed; 130: stopped, resumable.

    Example: ryot-deploy cluster-run --quick -o /tmp/first-run
    """
    from ryot.run.options import merge_options
    from ryot.run.plan import plan_to_toml, resolve_plan

    cluster = build_given(ctx, ClusterOptions)
    if cluster.bench_label and not cluster.address:
        raise click.UsageError("--bench-on needs a cluster of several machines: give --address too")
    if resume:
        run_dir, plan = resume, _plan_to_resume(resume, ctx)
    else:
        plan = resolve_plan(merge_options(config, given_values(ctx, RunOptions)))
        run_dir = output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{plan.label}"
    if dry_run:
        click.echo(plan_to_toml(plan), nl=False)
        return 0
    if not resume:
        check_output_folder(run_dir)
        _check_cluster(cluster.address)
        if plan.options.device == "cuda" and not cluster.address:
            from ryot.train.device import choose_device

            choose_device(plan.options.device)
    return _carry_out(run_dir, plan, cluster, build_given(ctx, DriverOptions), fmt, resume=bool(resume))


def _plan_to_resume(run_dir: Path, ctx: click.Context) -> RunPlan:
    from ryot.errors import ConfigError
    from ryot.run.folder import RunFolder
    from ryot.run.plan import load_plan

    for name in (*given_values(ctx, RunOptions), *(n for n in ("config", "output") if is_given(ctx, n))):
        raise ConfigError(
            f"{flag_of(RunOptions, name)}: cannot be changed when a run is resumed",
            hint="leave it out, or start a new run",
        )
    folder = RunFolder(run_dir)
    if not folder.plan.exists() or not folder.is_run:
        raise ConfigError(f"resume {run_dir}: is not a run folder (no {folder.plan.name} and {folder.journal.name})")
    return load_plan(folder.plan)


def _check_cluster(address: str | None) -> None:
    """Raise `ClusterError` when nothing answers where a cluster should be; said before anything heavy is loaded."""
    if address:
        from ryot.cluster.address import probe_address, resolve_address

        probe_address(*resolve_address(address))


def _carry_out(
    run_dir: Path, plan: RunPlan, cluster: ClusterOptions, driver: DriverOptions, fmt: Format, *, resume: bool
) -> int:
    from ryot.cli.progress import Progress
    from ryot.cluster.executor import RayExecutor
    from ryot.report.render import render
    from ryot.run.context import RunSettings
    from ryot.run.folder import RunFolder
    from ryot.run.pipeline import resume_run, start_run

    with Progress() as progress:
        settings = RunSettings(
            command=" ".join(["ryot-deploy", *sys.argv[1:]]),
            cache_dir=cache_dir(),
            executor=RayExecutor(cluster, driver),
            listeners=[progress],
        )
        outcome = (resume_run if resume else start_run)(run_dir, plan, settings)
    folder = RunFolder(run_dir)
    click.echo(render(outcome.report, fmt))
    click.echo(f"report: {folder.html}", err=True)
    if outcome.report.bundle:
        click.echo(f"bundle: {folder.bundle}", err=True)
    return outcome.exit_code
