"""What does a LoRA training learn of a text, and forget of others, at a rate and after so many tokens?

    python benchmarks/tuning/lora.py SOURCE --rate 2e-4 [--steps 48] [--threads 1]

The recipe `lora` with another rate, on the made-up command language of `adapt.py`; on the way, and at the end with the
adapters at a share of their size too, bits per byte of held-out windows of it and of the standard library's source,
over the model's before. One line a point on stdout.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from adapt_data import write_command_language, write_library_part

from ryot.config import replace, resolve_variant
from ryot.run.variant_data import prepare_variant
from ryot.train.batch import Batch
from ryot.train.corpus import load_corpus
from ryot.train.evaluate import evaluate
from ryot.train.loop import build_batches
from ryot.train.lora import adapters
from ryot.train.optimizer import schedule_factor
from ryot.train.step import TrainStep

WINDOWS = {"commands": 10, "library": 16}
SHARE = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--points", type=int, default=4, help="on the way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("adapt-work"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    variant = resolve_variant("lora", "reference", init=args.source)
    train = replace(variant.train, learning_rate=args.rate, tokens=args.steps * variant.step_tokens)
    variant = replace(variant, train=train)
    texts = {
        "commands": write_command_language(args.work / "commands", 300_000),
        "library": write_library_part(args.work / "general", 3_000_000),
    }
    datasets = {
        name: prepare_variant(variant, load_corpus([str(path)]), args.work / "cache")[0] for name, path in texts.items()
    }
    take = TrainStep(variant, replace(variant.kernels, threads=args.threads))

    def losses() -> dict[str, float]:
        return {
            name: evaluate(take.model, dataset, "test", WINDOWS[name], length=variant.sequence_length).bits_per_byte
            for name, dataset in datasets.items()
        }

    before = losses()
    trained_s = 0.0

    def tell(label: str) -> None:
        ratios = ", ".join(f"{name} {value / before[name]:.4f}" for name, value in losses().items())
        print(f"rate {args.rate:g}, {label}, {trained_s:.0f} s: {ratios}", flush=True)

    batches = build_batches(datasets["commands"], variant, seed=0)
    for step in range(args.steps):
        begin = time.perf_counter()
        take.take(Batch(*batches.batch(step)), schedule_factor(train, step, args.steps), step)
        trained_s += time.perf_counter() - begin
        if (step + 1) * args.points // args.steps > step * args.points // args.steps:
            tell(f"{(step + 1) * variant.step_tokens:,} tokens")
    for _, layer in adapters(take.model):
        layer.scale *= SHARE
    tell(f"adapters at {SHARE}")


if __name__ == "__main__":
    main()
