"""What does more computation buy: pass@k against the tokens it takes, for candidates that a verifier judges?

    python benchmarks/best_of.py [--variant rlvr] [--prompts 200] [--counts 1,2,4,8,16,32]
    python benchmarks/best_of.py --bundle BUNDLE --task tasks.jsonl

Held-out prompts of a task, answered by a bundle, or by the supervised half of a recipe that is trained for it here. For
each number of candidates: how often the best one passes, with the verifier ending the others as soon as one has passed
and without; how often the majority's answer would have passed; tokens computed and time, for each prompt. Intervals are
95 % over prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, describe_setting, write_result
from tabulate import tabulate

from ryot.cli.options import cache_dir
from ryot.config import replace, resolve_variant
from ryot.edge.best_of import choose_best
from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.scheduler import Scheduler, run_all
from ryot.edge.sequence import Request
from ryot.edge.slots import SlotEngine
from ryot.edge.tokenizer import Tokenizer, load_tokenizer
from ryot.edge.verifiers import MajorityVerifier, build_verifier
from ryot.reinforce.live_bundle import LiveBundle
from ryot.reinforce.tasks import Task, load_tasks, task_corpus
from ryot.reinforce.trainer import ReinforceTrainer
from ryot.train.dataset import prepare_dataset
from ryot.train.loop import TrainJob
from ryot.train.tokenizer import END_OF_TEXT_ID

PREFIX_BYTES = 64_000_000


def train_bundle(name: str, tokens: int | None, stack: ExitStack) -> tuple[Bundle, str, int]:
    """The supervised half of a recipe as a bundle, its task, and how long answers may be."""
    variant = resolve_variant(name, "reference", tokens=tokens)
    assert variant.rlvr is not None
    variant = replace(variant, rlvr=replace(variant.rlvr, steps=1))
    corpus = task_corpus(variant.rlvr.task, answers=variant.rlvr.answers)
    dataset, _ = prepare_dataset(corpus, variant.model.vocab_size, cache_dir())
    trainer = ReinforceTrainer(TrainJob(variant=variant, seed=0, dataset_dir=str(dataset.path)), variant.kernels)
    trainer.run_chunk(float("inf"), trainer.supervised_steps)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    tokenizer_json = (dataset.path / "tokenizer.json").read_bytes()
    live = LiveBundle(folder, variant.model.spec, {"tokenizer.json": tokenizer_json}, (END_OF_TEXT_ID,), END_OF_TEXT_ID)
    stack.callback(live.close)
    return live.update(trainer.arrays()), variant.rlvr.task, variant.rlvr.max_new_tokens


def requests_for(bundle: Bundle, tokenizer: Tokenizer, task: Task, count: int, max_tokens: int) -> list[Request]:
    ids = tokenizer.encode(task.prompt)
    if bundle.bos_token_id is not None and ids[:1] != [bundle.bos_token_id]:
        ids = [bundle.bos_token_id, *ids]
    sampling = SamplingParams(temperature=1.0, seed=0)
    return [Request(prompt_ids=ids, max_tokens=max_tokens, sampling=sampling, choice=c) for c in range(count)]


def measure(bundle: Bundle, tasks: Sequence[Task], counts: Sequence[int], max_tokens: int) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(bundle)
    most = max(counts)
    memory = bundle.model.kv_cache_bytes(bundle.model.context_length, most)
    scheduler = Scheduler(
        SlotEngine(bundle, batch_size=most, memory_bytes=memory), tokenizer, prefix_cache_bytes=PREFIX_BYTES
    )
    rows: list[dict[str, Any]] = []
    for count in counts:
        row: dict[str, Any] = {"count": count, "stopped": [], "all": [], "majority": []}
        row |= {f"{name}_{what}": [] for name in ("stopped", "all") for what in ("tokens", "s")}
        for task in tasks:
            verifier = build_verifier(task.verifier)
            before, begin = scheduler.counters.step_tokens, time.perf_counter()
            requests = requests_for(bundle, tokenizer, task, count, max_tokens)
            best = choose_best(scheduler, requests, task.prompt, verifier)[0]
            row["stopped_s"].append(time.perf_counter() - begin)
            row["stopped_tokens"].append(scheduler.counters.step_tokens - before)
            row["stopped"].append(best.verdict.passed)
            before, begin = scheduler.counters.step_tokens, time.perf_counter()
            answers = ["".join(event.text for event in events) for events in run_all(scheduler, requests)]
            passed = [verdict.passed for verdict in verifier.score(task.prompt, answers)]
            row["all_s"].append(time.perf_counter() - begin)
            row["all_tokens"].append(scheduler.counters.step_tokens - before)
            row["all"].append(any(passed))
            votes = [verdict.reward for verdict in MajorityVerifier(None).score(task.prompt, answers)]
            row["majority"].append(passed[int(np.argmax(votes))])
        rows.append(row)
        print(count, np.mean(row["all"]), np.mean(row["stopped_tokens"]), file=sys.stderr, flush=True)
    return rows


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over prompts."""
    array = np.asarray(values, np.float64)
    means = array[np.random.default_rng(0).integers(0, len(array), (2000, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="rlvr")
    parser.add_argument("--tokens", type=int, help="of the supervised steps, instead of the recipe's")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--task", help="instead of the recipe's; needed with --bundle")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer, instead of the recipe's")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--counts", default="1,2,4,8,16,32")
    args = parser.parse_args()
    if args.bundle and not args.task:
        parser.error("--bundle needs --task")
    with ExitStack() as stack:
        if args.bundle:
            bundle, task, max_tokens = load_bundle(args.bundle), args.task, 64
        else:
            bundle, task, max_tokens = train_bundle(args.variant, args.tokens, stack)
        tasks = [t for t in load_tasks(args.task or task) if t.split == "test"][: args.prompts]
        counts = [int(count) for count in args.counts.split(",")]
        rows = measure(bundle, tasks, counts, args.max_new_tokens or max_tokens)
    report(rows, args.task or task, len(tasks), bundle.model.num_parameters)


def report(rows: list[dict[str, Any]], task: str, prompts: int, params: int) -> None:
    table = []
    for row in rows:
        value, low, high = interval(row["all"])
        table.append(
            [
                row["count"],
                f"{value:.1%} [{low:.1%}, {high:.1%}]",
                f"{np.mean(row['stopped']):.1%}",
                f"{np.mean(row['majority']):.1%}",
                f"{np.mean(row['all_tokens']):.1f}",
                f"{np.mean(row['stopped_tokens']):.1f}",
                f"{1e3 * np.median(row['all_s']):.2f}",
                f"{1e3 * np.median(row['stopped_s']):.2f}",
            ]
        )
    head = [
        "candidates", "pass@k", "with early stop", "majority", "tokens", "tokens, early stop", "ms", "ms, early stop",
    ]  # fmt: skip
    setting = describe_setting()
    text = "\n".join(
        [
            f"# Best of several on {Path(task).name}, commit {setting['commit']}",
            "",
            f"{params / 1e6:.2f} M parameters, {prompts} held-out prompts, temperature 1, one thread. Tokens are "
            "means, times medians, for a prompt, judging included.",
            "",
            tabulate(table, head, tablefmt="github", disable_numparse=True),
        ]
    )
    path = write_result("best_of", {**setting, "task": Path(task).name, "rows": rows}, text)
    drawing = path.with_suffix(".png")
    draw(rows, drawing)
    path.write_text(f"{text}\n\n![pass@k against tokens]({drawing.relative_to(RESULTS)})\n")
    print(path)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, tokens, label in (
        ("all", "all_tokens", "best of all candidates"),
        ("stopped", "stopped_tokens", "ended when one passes"),
        ("majority", "all_tokens", "majority"),
    ):
        points = [(np.mean(row[tokens]), *interval(row[name])) for row in rows]
        x, y, low, high = (list(column) for column in zip(*points))
        (line,) = axes.plot(x, y, marker="o", label=label)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("tokens computed for a prompt")
    axes.set_ylabel("share of prompts answered right")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
