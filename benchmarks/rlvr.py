"""What does reinforcement with verifiable rewards gain on held-out prompts, beside supervised training as long?

    python benchmarks/rlvr.py [--variant rlvr] [--seeds 3] [--threads 1] [--tokens N] [--steps N]
                              [--task TASK --answers N --new-tokens N] [--rate SHARE]

For each seed: the recipe as it is (supervised steps, then GRPO), with pass@1 and pass@k of held-out prompts on the way;
and the same recipe with supervised steps alone, as many more as take the time of the whole. Of these the best of four
evaluations on the way counts: that it may learn too long is not held against it. --answers leaves a task the first N of
its answers: what reinforcement is for, a verifier and few answers. All curves are kept and drawn. Intervals are 95 %
over prompts; the gain's is a bootstrap over prompts of the difference, seed by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, describe_setting, write_result
from tabulate import tabulate

from ryot.cli.options import cache_dir
from ryot.config import KernelPlan, VariantConfig, replace, resolve_variant
from ryot.events import PassEvent, ReinforceEvent, event_to_dict
from ryot.reinforce.tasks import task_corpus
from ryot.reinforce.trainer import ReinforceTrainer
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.loop import TrainJob

ALONE_LOOKS = 4
FIGURES = ("reward", "entropy", "length", "mismatch")


def start(variant: VariantConfig, seed: int, dataset: Dataset, plan: KernelPlan) -> ReinforceTrainer:
    return ReinforceTrainer(TrainJob(variant=variant, seed=seed, dataset_dir=str(dataset.path)), plan)


def reinforce(trainer: ReinforceTrainer) -> dict[str, Any]:
    """Run a recipe to its end: its events, and times of both halves."""
    trainer.run_chunk(float("inf"), trainer.supervised_steps)
    supervised_s, begin = trainer.train_wall_s, time.perf_counter()
    events = []
    while not trainer.done:
        for event in trainer.run_chunk(10):
            if isinstance(event, (ReinforceEvent, PassEvent)):
                events.append(event)
            if isinstance(event, PassEvent):
                print(
                    f"step {event.reinforce_step}: pass@1 {event.pass_at_1:.3f}, pass@{event.samples} "
                    f"{event.pass_at_k:.3f}, {event.train_wall_s:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    trainer.close()
    return {
        "events": events,
        "supervised_s": supervised_s,
        "reinforced_s": trainer.train_wall_s - supervised_s,
        "elapsed_s": time.perf_counter() - begin + supervised_s,
    }


def supervised_alone(
    variant: VariantConfig, seed: int, dataset: Dataset, plan: KernelPlan, factor: float
) -> tuple[list[PassEvent], float]:
    """Held-out passes of the recipe without reinforcement, its budget `factor` times as large, at its quarters."""
    longer = replace(variant, train=replace(variant.train, tokens=int(variant.train.tokens * factor)))
    trainer = start(longer, seed, dataset, plan)
    found = []
    for quarter in range(1, ALONE_LOOKS + 1):
        trainer.run_chunk(float("inf"), trainer.supervised_steps * quarter // ALONE_LOOKS)
        found.append(trainer.evaluate_passes())
    trainer.close()
    return found, trainer.train_wall_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="rlvr")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of reinforcement, instead of the recipe's")
    parser.add_argument("--tokens", type=int, help="of the supervised steps, instead of the recipe's")
    parser.add_argument("--task", help="instead of the recipe's")
    parser.add_argument("--answers", type=int, metavar="N", help="known ones of the task's, instead of the recipe's")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="of an answer, instead of the recipe's")
    parser.add_argument("--rate", type=float, metavar="SHARE", help="of the learning rate, in reinforcement")
    args = parser.parse_args()
    variant = resolve_variant(args.variant, "reference", tokens=args.tokens)
    assert variant.rlvr is not None
    changed = {
        "task": args.task,
        "answers": args.answers,
        "steps": args.steps,
        "max_new_tokens": args.new_tokens,
        "learning_rate_share": args.rate,
    }
    rlvr = replace(variant.rlvr, **{name: value for name, value in changed.items() if value is not None})
    variant = replace(variant, rlvr=rlvr)
    plan = replace(variant.kernels, threads=args.threads)
    corpus = task_corpus(rlvr.task, answers=rlvr.answers)
    dataset, _ = prepare_dataset(corpus, variant.model.vocab_size, cache_dir())
    runs = []
    for seed in range(args.seeds):
        run = reinforce(start(variant, seed, dataset, plan))
        factor = 1 + run["reinforced_s"] / run["supervised_s"]
        run["seed"] = seed
        run["alone_looks"], run["alone_s"] = supervised_alone(variant, seed, dataset, plan, factor)
        run["alone"] = max(run["alone_looks"], key=lambda event: event.pass_at_1)
        looks = ", ".join(f"{event.pass_at_1:.3f}" for event in run["alone_looks"])
        print(f"seed {seed}: supervised alone {looks}", file=sys.stderr, flush=True)
        runs.append(run)
    report(variant, runs, args)


def show(event: PassEvent) -> str:
    return f"{event.pass_at_1:.1%} [{event.pass_at_1_low:.1%}, {event.pass_at_1_high:.1%}]"


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
                f"{100 * (after.pass_at_1 - before.pass_at_1):+.1f}",
                show(alone),
                f"{before.pass_at_k:.1%}",
                f"{after.pass_at_k:.1%}",
                f"{alone.pass_at_k:.1%}",
                f"{run['supervised_s']:.0f}",
                f"{run['reinforced_s']:.0f}",
                f"{run['alone_s']:.0f}",
                f"{run['elapsed_s']:.0f}",
            ]
        )
    k = variant.rlvr.eval_samples
    head = [
        "seed", "pass@1 before", "pass@1 after", "points", "supervised alone", f"pass@{k} before", f"pass@{k} after",
        f"pass@{k} alone", "supervised s", "GRPO s", "alone s", "all s",
    ]  # fmt: skip
    setting = describe_setting()
    steps = [event for run in runs for event in run["events"] if isinstance(event, ReinforceEvent)]
    largest = max((event.mismatch_max or 0.0 for event in steps), default=0.0)
    text = "\n".join(
        [
            f"# Reinforcement on {variant.rlvr.task}, commit {setting['commit']}",
            "",
            f"`{setting['command']}`: {variant.model.num_parameters / 1e6:.2f} M parameters, {args.threads} threads; "
            f"{variant.train.tokens:,} supervised tokens"
            + (f" of {variant.rlvr.answers:,} answers" if variant.rlvr.answers else "")
            + f", then {variant.rlvr.steps} steps of {variant.rlvr.prompts_per_step} prompts x "
            f"{variant.rlvr.samples_per_prompt} answers; {variant.rlvr.eval_prompts} held-out prompts x {k} answers at "
            "temperature 1. Supervised alone has the time of both together, and the best of its "
            f"{ALONE_LOOKS} evaluations on the way counts. The last column is all that passed until the model was "
            "there, evaluation included.",
            "",
            tabulate(table, head, tablefmt="github", disable_numparse=True),
            "",
            "The gain counts only where it is more than supervised training of the same time.",
            "",
            f"Largest difference of a token's log probability between engine and trainer: {largest:.1e}.",
        ]
    )
    kept = [
        {
            **{name: value for name, value in run.items() if name not in ("events", "alone", "alone_looks")},
            "alone": event_to_dict(run["alone"]),
            "alone_looks": columns(run["alone_looks"]),
            "passes": columns([e for e in run["events"] if isinstance(e, PassEvent)]),
            "steps": columns([e for e in run["events"] if isinstance(e, ReinforceEvent)]),
        }
        for run in runs
    ]
    values = {**setting, "recipe": dataclasses.asdict(variant), "runs": kept}
    name = f"rlvr-{variant.rlvr.task.replace(':', '-')}" if args.task else "rlvr"
    path = write_result(name, values, text)
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
    axes[0].set_title("held-out pass@1 (dotted: supervised alone)")
    axes[1].set_title("held-out pass@k")
    axes[5].set_yscale("log")
    for panel in axes:
        panel.set_xlabel("steps of reinforcement")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
