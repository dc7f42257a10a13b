"""`ryot-deploy cluster-run`: the main job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ryot.cli.options import HELP, CommaList, cache_dir, check_output_folder, format_option, verbose_option

#: Options that a run folder fixes: with --resume they cannot be given again.
_FIXED = (
    "preset",
    "variants",
    "ablate",
    "seeds",
    "precisions",
    "target",
    "data",
    "tokens",
    "quick",
    "tune",
    "rounds",
    "threads",
    "workers_per_variant",
    "config",
    "output",
)


@click.command("cluster-run", context_settings=HELP)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Run folder to make  [default: runs/DATE-TIME-PRESET]",
)
@click.option("--resume", metavar="DIR", type=click.Path(path_type=Path), help="Go on with a run that was stopped")
@click.option("--preset", metavar="NAME", default="reference", show_default=True, help="Size: a name or a TOML file")
@click.option(
    "--variants",
    metavar="LIST",
    type=CommaList(),
    default="baseline,optimized",
    show_default=True,
    help="Recipes, separated by commas: names or TOML files",
)
@click.option(
    "--ablate",
    is_flag=True,
    help="Train the baseline, the baseline with each optimization alone, and with all, instead of --variants",
)
@click.option("--seeds", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Seeds a variant")
@click.option(
    "--precisions",
    metavar="LIST",
    type=CommaList(),
    help="Weight formats; one named here that breaches its quality gate ends with exit code 4"
    "  [default: fp32,int8-dyn,int8,int4]",
)
@click.option(
    "--target",
    metavar="NAME",
    multiple=True,
    default=("phase1",),
    show_default=True,
    help="Limits to judge by: a name or a TOML file; may be repeated",
)
@click.option("--data", metavar="PATH", multiple=True, help="UTF-8 text files, folders, globs; may be repeated")
@click.option("--tokens", metavar="N", type=click.IntRange(min=1), help="Budget of the first variant; scales them all")
@click.option("--quick", is_flag=True, help="Small budget, brief measurement; the report is marked as not comparable")
@click.option("--tune/--no-tune", default=True, show_default=True, help="Let the machine choose training kernels")
@click.option(
    "--rounds", metavar="N", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds of measurement"
)
@click.option(
    "--threads", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each training"
)
@click.option(
    "--workers-per-variant",
    metavar="K",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that share each training, on one node or several; on one node --threads is faster",
)
@click.option(
    "--config", metavar="FILE", type=click.Path(path_type=Path), help="TOML file with these options as keys; flags win"
)
@click.option("--address", metavar="HOST:PORT", envvar="RAY_ADDRESS", help="Use this Ray cluster  [env: RAY_ADDRESS]")
@click.option(
    "--bench-on",
    metavar="LABEL",
    default="",
    help="Measure on a node with this custom resource or NAME=VALUE label, not on ours",
)
@click.option(
    "--max-hours", metavar="H", type=click.FloatRange(min=0, min_open=True), help="Stop, resumably, after so long"
)
@click.option(
    "--keep-checkpoints",
    metavar="N",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Checkpoints of each training that stay on disk",
)
@format_option("table", "md", "csv", "json")
@click.option("--dry-run", is_flag=True, help="Print the resolved plan as TOML and stop")
@verbose_option
@click.pass_context
def command(ctx: click.Context, **options: Any) -> int:
    """Train the variants in parallel, export, measure, judge, and bundle the best form.

    The table goes to stdout, progress to stderr; report and bundle lie in the run folder. Exit code 0: every target
    met; 1: something failed; 3: a target missed or inconclusive; 4: a quality gate failed; 130: stopped, resumable.

    Example: ryot-deploy cluster-run --quick -o /tmp/first-run
    """
    from ryot.plan import load_plan, merge_options, plan_to_toml, resolve_plan

    if options["bench_on"] and not options["address"]:
        raise click.UsageError("--bench-on needs a cluster of several machines: give --address too")
    given = {
        name: value
        for name, value in options.items()
        if name in _FIXED and ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)
    }
    resume: Path | None = options["resume"]
    if resume:
        run_dir = resume
        plan = _plan_to_resume(resume, given, load_plan)
    else:
        file = given.pop("config", None)
        output = given.pop("output", None)
        plan = resolve_plan(merge_options(file, given))
        run_dir = output or _default_folder(plan.options.preset)
        if not options["dry_run"]:
            check_output_folder(run_dir)
            _check_cluster(options["address"])
    if options["dry_run"]:
        click.echo(plan_to_toml(plan), nl=False)
        return 0
    return _carry_out(run_dir, plan, options, resume=bool(resume))


def _plan_to_resume(run_dir: Path, given: dict[str, Any], load_plan: Any) -> Any:
    from ryot.cluster.journal import FILE
    from ryot.errors import ConfigError

    if given:
        name = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{name}: cannot be changed when a run is resumed", hint="leave it out, or start a new run")
    if not (run_dir / "run.toml").exists() or not (run_dir / FILE).exists():
        raise ConfigError(f"resume {run_dir}: is not a run folder (no run.toml and {FILE})")
    return load_plan(run_dir / "run.toml")


def _check_cluster(address: str | None) -> None:
    """Raise `ClusterError` when nothing answers where a cluster should be; said before anything heavy is loaded."""
    if address:
        from ryot.cluster.address import probe_address, resolve_address

        probe_address(*resolve_address(address))


def _default_folder(preset: str) -> Path:
    import time

    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(preset).stem}"


def _carry_out(run_dir: Path, plan: Any, options: dict[str, Any], *, resume: bool) -> int:
    from ryot.cli.progress import Progress
    from ryot.cluster.jobs import DriverOptions
    from ryot.cluster.pipeline import RunSettings, resume_run, start_run
    from ryot.cluster.runtime import ClusterOptions
    from ryot.report.table import render

    with Progress() as progress:
        settings = RunSettings(
            command=" ".join(["ryot-deploy", *sys.argv[1:]]),
            cache_dir=cache_dir(),
            cluster=ClusterOptions(address=options["address"], bench_label=options["bench_on"]),
            driver=DriverOptions(max_hours=options["max_hours"], keep_checkpoints=options["keep_checkpoints"]),
            listeners=[progress],
        )
        outcome = (resume_run if resume else start_run)(run_dir, plan, settings)
    click.echo(render(outcome.report, options["fmt"]))
    click.echo(f"report: {run_dir / 'report.html'}", err=True)
    if outcome.report.bundle:
        click.echo(f"bundle: {run_dir / 'bundle'}", err=True)
    return outcome.exit_code
