"""The main job from end to end: `_carry_through` has the stages in their order.

A stage whose inputs are unchanged is not done again when the run is resumed. Where everything lies says `folder`.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from ryot.atomic import write_atomically
from ryot.errors import Interrupted, RyotError, TrainingError
from ryot.report.plots import check_plots
from ryot.run.context import RunContext, RunSettings
from ryot.run.finalize import Outcome, StageResults, finalize
from ryot.run.folder import RunFolder, resume_hint
from ryot.run.inputs import prepare_inputs
from ryot.run.lock import RunLock
from ryot.run.measurement import measure_artifacts
from ryot.run.plan import RunPlan, plan_to_toml
from ryot.run.stages import import_models, train_and_export, tune_variants
from ryot.train.loop import TrainJob
from ryot.train.parallel import check_shares


def start_run(path: Path, plan: RunPlan, settings: RunSettings) -> Outcome:
    """Begin a run in an empty folder, or one that does not exist yet, and carry it through."""
    folder = RunFolder(path)
    check_plots()  # which come last
    for variant in plan.variants:
        check_shares(TrainJob(variant=variant, seed=0, dataset_dir=""), plan.options.workers_per_variant)
    with _disk_errors(folder, "start the run again"):
        path.mkdir(parents=True, exist_ok=True)
        _check_disk(folder, plan)
        write_atomically(folder.plan, plan_to_toml(plan))
    return _run(folder, plan, settings)


def resume_run(path: Path, plan: RunPlan, settings: RunSettings) -> Outcome:
    """Carry a run through from wherever it stopped.

    Raises `Interrupted` with the command that resumes it, and every other `RyotError` for what cannot be carried
    through; what is done by then stays done.
    """
    folder = RunFolder(path)
    check_plots()
    _check_disk(folder, plan)
    return _run(folder, plan, settings)


def _carry_through(context: RunContext, plan: RunPlan) -> Outcome:
    context.journal.open_run()
    inputs = prepare_inputs(context, plan)
    with contextlib.closing(context.executor):  # all training has ended before anything is measured
        plan = tune_variants(context, plan, inputs)
        imports = import_models(context, plan, inputs)
        trainings, trained = train_and_export(context, plan, inputs)
    artifacts = [*trained, *(artifact for result in imports for artifact in result.artifacts)]
    measured = measure_artifacts(context, plan, artifacts)
    return finalize(
        context,
        StageResults(
            plan=plan, inputs=inputs, trainings=trainings, imports=imports, artifacts=artifacts, measured=measured
        ),
    )


def _run(folder: RunFolder, plan: RunPlan, settings: RunSettings) -> Outcome:
    """All stages, under the folder's lock; whatever stops them says how to resume."""
    resume = resume_hint(folder.path)
    with RunLock(folder), _disk_errors(folder, resume), contextlib.closing(RunContext(folder, settings)) as context:
        try:
            return _carry_through(context, plan)
        except KeyboardInterrupt:
            raise Interrupted("stopped by a signal", hint=resume) from None
        except Interrupted as error:
            raise Interrupted(str(error), hint=resume) from None
        except TrainingError as error:
            error.hint = error.hint or resume
            raise


@contextlib.contextmanager
def _disk_errors(folder: RunFolder, then: str) -> Iterator[None]:
    """A disk that is full, read-only or gone is one line with what to do; nothing that counts is lost by it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        first = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fix this"
        raise RyotError(f"run {folder}: {what}{error.strerror or error}", hint=f"{first}. {then}") from error


def _check_disk(folder: RunFolder, plan: RunPlan) -> None:
    """Checkpoints hold weights and two moments; a few are kept, and each artifact is at most the weights again."""
    weights = sum(4 * v.model.num_parameters for v in plan.variants) * plan.options.seeds
    needed = 4 * 3 * weights + 6 * weights + 100_000_000
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        raise RyotError(
            f"output {folder}: {free / 1e6:.0f} MB free on the disk, expected about {needed / 1e6:.0f} MB",
            hint="make room, or choose another folder with -o",
        )
