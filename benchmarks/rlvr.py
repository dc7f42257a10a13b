"""What does reinforcement with verifiable rewards gain on held-out prompts, beside supervised training as long?

    python benchmarks/rlvr.py [--variant rlvr] [--seeds 3] [--threads 1]
    python benchmarks/rlvr.py --task sorting:4 --answers 500 --tokens 300000 --steps 150 --rate 0.12

For each seed: the recipe as it is (supervised steps, then GRPO), with pass@1 and pass@k of held-out prompts on the way;
and the same recipe with supervised steps alone, as many more as take the CPU time of the whole, from which the best
moment is taken, by the same held-out prompts. With `--answers` the others of the task's answers are hidden from both:
what a verifier is for where few answers are known. All curves are kept and drawn. Intervals are 95 %, by a bootstrap
over prompts; of a difference, over each prompt's.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, describe_setting, write_result
from tabulate import tabulate

from ryot.cli.options import cache_dir
from ryot.config import KernelPlan, VariantConfig, replace, resolve_variant
from ryot.events import EvalEvent, PassEvent, ReinforceEvent, event_to_dict
from ryot.reinforce.pass_at_k import CONFIDENCE, RESAMPLES
from ryot.reinforce.tasks import Task, load_tasks, task_corpus
from ryot.reinforce.trainer import Judged, ReinforceTrainer
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.loop import TrainJob

FIGURES = ("reward", "entropy", "length", "mismatch")
#: Moments of supervised training alone that are looked at, evenly spread, the last its end.
LOOKS_AT_ALONE = 8


class TimedTrainer(ReinforceTrainer):
    """Keeps what each held-out prompt came to, and counts CPU time without evaluation."""

    def __init__(self, job: TrainJob, plan: KernelPlan):
        super().__init__(job, plan)
        self._begin, self._apart = time.process_time(), 0.0
        self._judged_last: list[int] = []
        self.passed: list[list[int]] = []
        """For each evaluation, how many answers to each prompt passed."""

    @property
    def train_cpu_s(self) -> float:
        return time.process_time() - self._begin - self._apart

    def evaluate(self, split: str, windows: int) -> EvalEvent:
        begin = time.process_time()
        event = super().evaluate(split, windows)
        self._apart += time.process_time() - begin
        return event

    def evaluate_passes(self) -> PassEvent:
        begin = time.process_time()
        event = super().evaluate_passes()
        self.passed.append(self._judged_last)
        self._apart += time.process_time() - begin
        return event

    def sample_tasks(self, tasks: Sequence[Task], num_samples: int, seed: int) -> Judged:
        judged = super().sample_tasks(tasks, num_samples, seed)
        self._judged_last = list(judged.passed)
        return judged


def start(variant: VariantConfig, seed: int, dataset: Dataset, plan: KernelPlan) -> TimedTrainer:
    return TimedTrainer(TrainJob(variant=variant, seed=seed, dataset_dir=str(dataset.path)), plan)


def tell(what: str, event: PassEvent, cpu_s: float) -> None:
    print(
        f"{what}: pass@1 {event.pass_at_1:.3f}, pass@{event.samples} {event.pass_at_k:.3f}, "
        f"{event.train_wall_s:.0f} s, CPU {cpu_s:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def reinforce(trainer: TimedTrainer) -> dict[str, Any]:
    """Run a recipe to its end: its events, and times of both halves."""
    trainer.run_chunk(float("inf"), trainer.supervised_steps)
    supervised_s, supervised_cpu_s, begin = trainer.train_wall_s, trainer.train_cpu_s, time.perf_counter()
    events = []
    while not trainer.done:
        for event in trainer.run_chunk(10):
            if isinstance(event, (ReinforceEvent, PassEvent)):
                events.append(event)
            if isinstance(event, PassEvent):
                tell(f"step {event.reinforce_step}", event, trainer.train_cpu_s)
    trainer.close()
    return {
        "events": events,
        "passed": trainer.passed,
        "supervised_s": supervised_s,
        "supervised_cpu_s": supervised_cpu_s,
        "reinforced_s": trainer.train_wall_s - supervised_s,
        "reinforced_cpu_s": trainer.train_cpu_s - supervised_cpu_s,
        "elapsed_s": time.perf_counter() - begin + supervised_s,
    }


def supervised_alone(
    variant: VariantConfig, seed: int, dataset: Dataset, plan: KernelPlan, factor: float
) -> dict[str, Any]:
    """Held-out passes on the way of the recipe without reinforcement, its budget `factor` times as large."""
    longer = replace(variant, train=replace(variant.train, tokens=int(variant.train.tokens * factor)))
    trainer = start(longer, seed, dataset, plan)
    events = []
    for look in range(1, LOOKS_AT_ALONE + 1):
        trainer.run_chunk(float("inf"), trainer.supervised_steps * look // LOOKS_AT_ALONE - trainer.step)
        events.append(trainer.evaluate_passes())
        tell(f"supervised alone, step {trainer.step}", events[-1], trainer.train_cpu_s)
    trainer.close()
    best = max(range(LOOKS_AT_ALONE), key=lambda look: events[look].pass_at_1)
    return {
        "alone": events[best],
        "alone_events": events,
        "alone_passed": trainer.passed,
        "alone_best": best,
        "alone_s": trainer.train_wall_s,
        "alone_cpu_s": trainer.train_cpu_s,
    }


def difference(passed: Sequence[int], beside: Sequence[int], num_samples: int) -> list[float]:
    """pass@1 over that of others on the same prompts, and its interval."""
    differences = (np.array(passed) - np.array(beside)) / num_samples
    rng = np.random.default_rng(0)
    means = differences[rng.integers(0, len(differences), (RESAMPLES, len(differences)))].mean(axis=1)
    ends = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return [float(value) for value in (differences.mean(), *ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="rlvr")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--task", help="instead of the recipe's, as are all that follow")
    parser.add_argument("--answers", type=int, help="known of the task; the other prompts are reinforced on")
    parser.add_argument("--tokens", type=int, help="of the supervised steps")
    parser.add_argument("--steps", type=int, help="of reinforcement")
    parser.add_argument("--rate", type=float, help="of reinforcement, as a share of the supervised")
    args = parser.parse_args()
    variant = resolve_variant(args.variant, "reference", tokens=args.tokens)
    assert variant.rlvr is not None
    given = {"task": args.task, "answers": args.answers, "steps": args.steps, "learning_rate_share": args.rate}
    rlvr = replace(variant.rlvr, **{name: value for name, value in given.items() if value is not None})
    variant = replace(variant, rlvr=rlvr)
    plan = replace(variant.kernels, threads=args.threads)
    corpus = task_corpus(rlvr.task, answers=rlvr.answers)
    dataset, _ = prepare_dataset(corpus, variant.model.vocab_size, cache_dir())
    runs = []
    for seed in range(args.seeds):
        load = [os.getloadavg()[0]]
        run = reinforce(start(variant, seed, dataset, plan))
        load.append(os.getloadavg()[0])
        factor = 1 + run["reinforced_cpu_s"] / run["supervised_cpu_s"]
        run |= supervised_alone(variant, seed, dataset, plan, factor)
        run |= {"seed": seed, "load_average": [*load, os.getloadavg()[0]]}
        for name, beside in (("gain", run["passed"][0]), ("over_alone", run["alone_passed"][run["alone_best"]])):
            run[name] = difference(run["passed"][-1], beside, rlvr.eval_samples)
        runs.append(run)
    report(variant, runs, args)


def show(event: PassEvent) -> str:
    return f"{event.pass_at_1:.1%} [{event.pass_at_1_low:.1%}, {event.pass_at_1_high:.1%}]"


def show_points(difference: Sequence[float]) -> str:
    value, low, high = (100 * part for part in difference)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def show_times(run: dict[str, Any], name: str) -> str:
    return f"{run[f'{name}_s']:.0f} ({run[f'{name}_cpu_s']:.0f})"


def report(variant: VariantConfig, runs: list[dict[str, Any]], args: argparse.Namespace) -> None:
    assert variant.rlvr is not None
    table = []
    for run in runs:
        passes = [event for event in run["events"] if isinstance(event, PassEvent)]
        before, after, alone = passes[0], passes[-1], run["alone"]
        table.append(
            [
                run["seed"],
                show(before),
                show(after),
                show_points(run["gain"]),
                show(alone),
                show_points(run["over_alone"]),
                f"{before.pass_at_k:.1%}",
                f"{after.pass_at_k:.1%}",
                f"{alone.pass_at_k:.1%}",
                *(show_times(run, name) for name in ("supervised", "reinforced", "alone")),
                f"{run['elapsed_s']:.0f}",
            ]
        )
    k = variant.rlvr.eval_samples
    head = [
        "seed", "pass@1 before", "pass@1 after", "points", "supervised alone, best", "points over it",
        f"pass@{k} before", f"pass@{k} after", f"pass@{k} alone",
        "supervised s (CPU)", "GRPO s (CPU)", "alone s (CPU)", "all s",
    ]  # fmt: skip
    setting = describe_setting()
    steps = [event for run in runs for event in run["events"] if isinstance(event, ReinforceEvent)]
    largest = max((event.mismatch_max or 0.0 for event in steps), default=0.0)
    tasks = [t for t in load_tasks(variant.rlvr.task, answers=variant.rlvr.answers) if t.split == "train"]
    better = sum(run["over_alone"][1] > 0 for run in runs)
    loads = [load for run in runs for load in run["load_average"]]
    text = "\n".join(
        [
            f"# Reinforcement on {variant.rlvr.task}, commit {setting['commit']}",
            "",
            f"Recipe `{variant.name}`, {variant.model.num_parameters / 1e6:.2f} M parameters, {args.threads} threads; "
            f"{sum(t.answer is not None for t in tasks):,} of {len(tasks):,} training prompts have an answer that is "
            f"known. {variant.train.tokens:,} supervised tokens, then {variant.rlvr.steps} steps of "
            f"{variant.rlvr.prompts_per_step} prompts x {variant.rlvr.samples_per_prompt} answers at "
            f"{variant.rlvr.learning_rate_share:g} of the rate; "
            f"{variant.rlvr.eval_prompts} held-out prompts x {k} answers at temperature 1. Supervised alone has the "
            f"same answers and the CPU time of both together, and the best of {LOOKS_AT_ALONE} moments on its way is "
            "taken, by the same held-out prompts; of the reinforced it is the last. Times are of training; the last "
            "column is all that passed until the model was there, evaluation included.",
            "",
            tabulate(table, head, tablefmt="github", disable_numparse=True),
            "",
            "The gain counts only where it is more than supervised training of the same time: here in "
            f"{better} of {len(runs)} seeds (the interval of the difference is above 0).",
            "",
            f"The machine's load average was {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores, this "
            "benchmark's own process included.",
            "",
            f"Largest difference of a token's log probability between engine and trainer: {largest:.1e}.",
        ]
    )
    kept = [
        {
            **{name: value for name, value in run.items() if name not in ("events", "alone", "alone_events")},
            "alone": columns(run["alone_events"]),
            "passes": columns([e for e in run["events"] if isinstance(e, PassEvent)]),
            "steps": columns([e for e in run["events"] if isinstance(e, ReinforceEvent)]),
        }
        for run in runs
    ]
    values = {**setting, "recipe": dataclasses.asdict(variant), "runs": kept}
    path = write_result("rlvr-few" if variant.rlvr.answers else "rlvr", values, text)
    drawing = path.with_suffix(".png")
    draw(runs, drawing)
    path.write_text(f"{text}\n\n![Curves]({drawing.relative_to(RESULTS)})\n")
    print(path)


def columns(events: list[Any]) -> dict[str, list[Any]]:
    """A series for each field of events of one kind."""
    rows = [event_to_dict(event) for event in events]
    names = [name for name in rows[0] if name not in ("kind", "variant", "seed", "time")]
    return {name: [row.get(name) for row in rows] for name in names}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for run in runs:
        color = f"C{run['seed']}"
        passes = [event for event in run["events"] if isinstance(event, PassEvent)]
        steps = [event for event in run["events"] if isinstance(event, ReinforceEvent)]
        for panel, name in ((axes[0], "pass_at_1"), (axes[1], "pass_at_k")):
            x = [event.reinforce_step for event in passes]
            panel.plot(x, [getattr(event, name) for event in passes], color=color, label=f"seed {run['seed']}")
            band = ([getattr(event, f"{name}_{end}") for event in passes] for end in ("low", "high"))
            panel.fill_between(x, *band, color=color, alpha=0.15, linewidth=0)
            panel.axhline(getattr(run["alone"], name), color=color, linestyle=":")
        for panel, name in zip(axes[2:], FIGURES):
            known = [(event.step, getattr(event, name)) for event in steps if getattr(event, name) is not None]
            panel.plot([step for step, _ in known], [value for _, value in known], color=color, linewidth=0.8)
            panel.set_title(name)
    axes[0].set_title("held-out pass@1 (dotted: supervised alone, best)")
    axes[1].set_title("held-out pass@k")
    axes[5].set_yscale("log")
    for panel in axes:
        panel.set_xlabel("steps of reinforcement")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
