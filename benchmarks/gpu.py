"""What does a GPU make of our training: the share of its peak, a step of nanoGPT's, and nanochat's recipe?

    python benchmarks/gpu.py --nanogpt FOLDER --nanochat FOLDER [--text FOLDER] [--parts step,recipe]
                             [--rounds N] [--seconds N] [--seeds N]
                             [--recipes NAME:BATCH,...]

FOLDER is a checkout of the peer; its own model and optimizer are imported from there. *step*: the trainings of all
rows take turns on one card, ten steps each by round, every step from the batch's making to the loss in the
process; ratios are paired by round, with the 98 % interval. *recipe*: each recipe gets the same seconds of training,
compiling and held-out losses left out, and its schedule is fitted to the steps that it can take in them. Both learn the
text under --text (default: the packages installed here) under one vocabulary, in windows of one length, and are scored
in bits per byte on the same held-out windows.

The share of the peak counts what the model's products ask for, 6 operations for each weight of a product and token and
12 for each layer, channel and position that is attended to, of which causal attention saves half; nothing that is
computed twice. It is held against the card's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_peers import nanogpt_step, train_nanochat
from record import RESULTS, describe_setting, write_result
from tabulate import tabulate

from ryot.cli.options import cache_dir
from ryot.config import KernelPlan, VariantConfig, replace, resolve_variant
from ryot.report.stats import ratio_interval
from ryot.train.batch import Batch
from ryot.train.corpus import load_corpus
from ryot.train.dataset import Batches, Dataset, prepare_dataset
from ryot.train.device import place_kernels
from ryot.train.evaluate import evaluate
from ryot.train.model import Decoder
from ryot.train.optimizer import schedule_factor
from ryot.train.step import TrainStep

#: Dense bf16 operations per second, as the vendor states them.
PEAKS = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12, "A100": 312e12}
LENGTH, VOCAB_SIZE = 1024, 24_576
STEPS_PER_ROUND = 10
WARM_STEPS = 5
HELD_OUT_WINDOWS = 256
GOAL_SHARE = 0.45


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training that takes turns: `step` takes one step and leaves its loss on the CPU."""

    name: str
    tokens: int
    operations: float
    """Of the model's products, for each token."""
    step: Callable[[], float]


def main() -> None:
    options = _parse()
    torch.set_float32_matmul_precision("highest")
    card = torch.cuda.get_device_name()
    values: dict[str, Any] = {
        **describe_setting(),
        "card": card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    sections = [
        f"# On a GPU: {card}\n",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, commit {values['commit']}.\n",
    ]
    if "step" in options.parts:
        values["step"] = measure_steps(options)
        sections.append(render_steps(values["step"], card))
    if "recipe" in options.parts:
        values["recipe"] = compare_recipes(options)
        sections.append(render_recipes(values["recipe"]))
    print(write_result("gpu", values, "\n".join(sections), options.output).read_text())


# Steps


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each step of each case, by rounds."""
    measured: dict[str, Any] = {"product_tflops": _product_rate() / 1e12, "cases": {}}
    for group in (_group_124m, _group_shipped):
        cases = group(options)
        times: dict[str, list[list[float]]] = {case.name: [] for case in cases}
        losses = {case.name: [case.step() for _ in range(WARM_STEPS)] for case in cases}
        for _ in range(options.rounds):
            for case in cases:
                times[case.name].append([])
                for _ in range(STEPS_PER_ROUND):
                    begin = time.perf_counter()
                    losses[case.name].append(case.step())
                    times[case.name][-1].append((time.perf_counter() - begin) * 1e3)
        for case in cases:
            last = losses[case.name][-1]
            if not last < losses[case.name][0]:
                raise SystemExit(f"{case.name}: its loss went from {losses[case.name][0]:.3f} to {last:.3f}")
            measured["cases"][case.name] = {
                "tokens": case.tokens,
                "operations_per_token": case.operations,
                "step_ms": [[round(ms, 3) for ms in row] for row in times[case.name]],
            }
        del cases
        torch.cuda.empty_cache()
    return measured


def _group_124m(options: argparse.Namespace) -> list[Case]:
    """The same shape, GPT-2's smallest, ours and nanoGPT's; and the optimized recipe of that width."""
    batch = options.batch
    cases = [
        _ours("baseline's decoder, 124m", resolve_variant("baseline", "124m"), batch),
        _ours("wide, 124m", resolve_variant("wide", "124m"), batch),
    ]
    if options.nanogpt:
        step, weights = nanogpt_step(options.nanogpt, _random_ids(batch, LENGTH, VOCAB_SIZE), LENGTH, VOCAB_SIZE)
        operations = 6.0 * weights + 12.0 * 12 * 768 * LENGTH
        cases.append(Case(name="nanoGPT, 124M", tokens=batch * LENGTH, operations=operations, step=step))
    return cases


def _group_shipped(options: argparse.Namespace) -> list[Case]:
    """The presets with the batch that the recipe ships with: few tokens per step."""
    variants = {preset: resolve_variant("wide", preset) for preset in ("30m", "124m", "350m")}
    return [_ours(f"wide, {p}, its own batch", v, v.train.batch_size) for p, v in variants.items()]


def _ours(name: str, variant: VariantConfig, batch: int) -> Case:
    """Our step with a GPU's kernels, compiled, on random ids."""
    variant = replace(variant, train=replace(variant.train, batch_size=batch))
    torch.manual_seed(0)
    take_step = TrainStep(variant, _plan(variant))
    length, vocab = variant.sequence_length, variant.model.vocab_size
    next_ids = _random_ids(batch, length, vocab)

    def step() -> float:
        ids = next(next_ids)
        loss, _ = take_step.take(Batch(ids[:, :-1], ids[:, 1:]), 0.1, 0)
        return loss

    return Case(name=name, tokens=batch * length, operations=_operations(take_step.model, length), step=step)


def _plan(variant: VariantConfig) -> KernelPlan:
    """What a GPU's training starts from, and compiled."""
    return replace(place_kernels(replace(variant, tune=True), "cuda", 1), compile=True)


def _operations(model: Decoder, length: int) -> float:
    spec = model.spec
    # A table that is looked up is no product; one that is the head too is.
    looked_up = {"positions.weight"} | (set() if spec.tie_embeddings else {"embedding.weight"})
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name not in looked_up)
    return 6.0 * weights + 12.0 * spec.num_layers * spec.q_dim * length


def _random_ids(batch: int, length: int, vocab_size: int) -> Iterator[torch.Tensor]:
    """Ids of a skewed distribution, so that there is something to learn."""
    rng = np.random.default_rng(0)
    while True:
        yield torch.from_numpy((rng.random((batch, length + 1)) ** 4 * vocab_size).astype(np.int64))


def _product_rate(size: int = 8192) -> float:
    """Operations per second of one large product in bf16: what this card gives at best."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for number in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return 2.0 * size**3 / statistics.median(times)


def render_steps(measured: dict[str, Any], card: str) -> str:
    """The table of steps and what was asked of them."""
    peak = next((rate for name, rate in PEAKS.items() if name in card), None)
    rows, shares = [], {}
    for name, case in measured["cases"].items():
        rates = [case["tokens"] / (statistics.median(row) / 1e3) for row in case["step_ms"]]
        rate = statistics.median(rates)
        shares[name] = rate * case["operations_per_token"] / peak if peak else float("nan")
        spread = (max(rates) - min(rates)) / rate
        rows.append(
            [
                name,
                case["tokens"],
                f"{case['tokens'] / rate * 1e3:.2f}",
                f"{rate / 1e3:.0f}",
                f"{spread:.1%}",
                f"{shares[name]:.1%}",
            ]
        )
    header = ["case", "tokens per step", "ms per step", "thousand tok/s", "spread of rounds", "of the peak"]
    lines = ["## Steps\n", tabulate(rows, header, tablefmt="github", disable_numparse=True), ""]
    ours, peer = (measured["cases"].get(n) for n in ("baseline's decoder, 124m", "nanoGPT, 124M"))
    best = max((share for name, share in shares.items() if "124m" in name), default=float("nan"))
    met = "met" if best >= GOAL_SHARE else "not met"
    lines.append(f"- Of the card's dense bf16 peak at 124M: {best:.1%} (goal {GOAL_SHARE:.0%}, {met}).")
    if ours and peer:
        interval = ratio_interval(peer["step_ms"], ours["step_ms"])
        assert interval is not None
        lines.append(
            f"- Tokens a second against nanoGPT's step, same shape and batch: {interval.value:.3f}x"
            f" ({interval.low:.3f} to {interval.high:.3f})."
        )
    lines.append(f"- A product of 8192 x 8192 x 8192 alone: {measured['product_tflops']:.0f} TFLOP/s.\n")
    return "\n".join(lines)


# Recipes


def compare_recipes(options: argparse.Namespace) -> dict[str, Any]:
    """Held-out bits per byte of each recipe and seed after the same seconds of training."""
    text = options.text or Path(sysconfig.get_paths()["purelib"])
    begin = time.perf_counter()
    dataset, _ = prepare_dataset(load_corpus([f"{text}/**/*.py"]), VOCAB_SIZE, cache_dir(), on_progress=print)
    print(f"text ready after {time.perf_counter() - begin:.0f} s", flush=True)
    seconds, windows = options.seconds, HELD_OUT_WINDOWS
    recipes: dict[str, Callable[[int], dict[str, Any]]] = {
        f"{name}, 124m, {batch} sequences a step": functools.partial(_train, name, batch, dataset, seconds)
        for name, batch in options.recipes
    }
    if options.nanochat:
        recipes["nanochat, depth 12"] = lambda seed: train_nanochat(
            options.nanochat, dataset, seed, seconds, LENGTH, windows
        )
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    for seed in range(options.seeds):
        for name, train in recipes.items():
            runs[name].append(train(seed))
            print(name, seed, {k: v for k, v in runs[name][-1].items() if k != "losses"}, flush=True)
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    facts = {"seconds": seconds, "train_tokens": dataset.num_tokens["train"], "corpus_sha256": dataset.corpus_sha256}
    return {**facts, "runs": runs}


def _train(name: str, batch: int, dataset: Dataset, seconds: float, seed: int) -> dict[str, Any]:
    """A recipe of ours with as many steps as fit into `seconds`, timed on its own first steps."""
    variant = resolve_variant(name, "124m")
    variant = replace(variant, train=replace(variant.train, batch_size=batch))
    batches = Batches(dataset, length=LENGTH, batch_size=batch, seed=seed)
    torch.manual_seed(seed)
    probe = TrainStep(variant, _plan(variant))
    for number in range(WARM_STEPS):
        probe.take(Batch(*batches.batch(number)), 0.0, 0)
    begin = time.perf_counter()
    for number in range(20):
        probe.take(Batch(*batches.batch(number)), 0.0, 0)
    steps = int(seconds / (time.perf_counter() - begin) * 20)
    variant = replace(variant, train=replace(variant.train, tokens=steps * batch * LENGTH))
    torch.manual_seed(seed)
    step = TrainStep(variant, _plan(variant))
    step.warm_up(*batches.batch(0))
    losses, begin = [], time.perf_counter()
    for number in range(steps):
        losses.append(
            step.take(Batch(*batches.batch(number)), schedule_factor(variant.train, number, steps), number)[0]
        )
    spent = time.perf_counter() - begin
    return {
        "bits_per_byte": evaluate(step.model, dataset, "val", HELD_OUT_WINDOWS).bits_per_byte,
        "train_s": round(spent, 2),
        "steps": steps,
        "tokens": steps * batch * LENGTH,
        "batch_tokens": batch * LENGTH,
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "losses": [round(loss, 4) for loss in losses[:: max(1, steps // 50)]],
    }


def render_recipes(measured: dict[str, Any]) -> str:
    """The table of recipes, best first."""
    rows = []
    for name, runs in measured["runs"].items():
        scores = [run["bits_per_byte"] for run in runs]
        first = runs[0]
        rows.append(
            (
                statistics.fmean(scores),
                [
                    name,
                    " ".join(f"{score:.4f}" for score in scores),
                    f"{statistics.fmean(run['train_s'] for run in runs):.1f}",
                    f"{first['tokens'] / 1e6:.1f}",
                    first["steps"],
                    f"{first['parameters'] / 1e6:.0f}",
                ],
            )
        )
    header = ["recipe", "held-out bits per byte, by seed", "s trained", "M tokens", "steps", "M parameters"]
    table = tabulate([row for _, row in sorted(rows)], header, tablefmt="github", disable_numparse=True)
    about = f"{measured['seconds']:g} s of training each; {measured['train_tokens'] / 1e6:.0f} M tokens of text.\n"
    return "\n".join(["## Recipes\n", about, table])


def _recipes(text: str) -> list[tuple[str, int]]:
    return [(name, int(batch)) for name, _, batch in (part.partition(":") for part in text.split(","))]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--nanochat", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--recipes", default="wide:8,optimized:8", type=_recipes, help="of ours, with their batches")
    parser.add_argument("--parts", default="step,recipe", type=lambda names: names.split(","))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    return options


if __name__ == "__main__":
    main()
