"""What does a model that can be cut cost, against the full width alone and against each narrower width alone?

    python benchmarks/elastic.py [--seeds 2]

Trains the recipe `elastic` at the reference preset, cuts its checkpoint to every width it was trained for, and trains
each of these shapes by itself with the same recipe, budget and seed. Losses are taken as at the end of any training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import describe_setting, write_result
from tabulate import tabulate

from ryot.cli.options import cache_dir
from ryot.config import ModelConfig, replace, resolve_variant
from ryot.models.spec import narrow_spec
from ryot.optimize.compression import slice_checkpoint
from ryot.train.checkpoint import load_model
from ryot.train.corpus import load_corpus
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.evaluate import evaluate
from ryot.train.loop import Trainer, TrainJob


def narrow(model: ModelConfig, width: int) -> ModelConfig:
    if width == model.dim:
        return model
    spec = narrow_spec(model.spec, width)
    sizes = {name: getattr(spec, name) for name in ("dim", "num_heads", "num_kv_heads", "ff_dim")}
    return replace(model, **sizes)


def losses(checkpoint: Path, dataset: Dataset) -> dict[str, float]:
    model = load_model(checkpoint)
    return {split: evaluate(model, dataset, split).loss for split in ("val", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = resolve_variant("elastic", "reference", tokens=args.tokens)
    dataset, _ = prepare_dataset(load_corpus(), recipe.model.vocab_size, cache_dir())
    widths = [recipe.model.dim, *sorted(recipe.train.elastic_widths, reverse=True)]
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(TrainJob(variant=recipe, seed=seed, dataset_dir=str(dataset.path)), recipe.kernels)
            trainer.run_chunk(float("inf"))
            full = Path(scratch) / "full"
            trainer.save(full)
            for width in widths:
                cut = full
                if width < recipe.model.dim:
                    cut = Path(scratch) / str(width)
                    slice_checkpoint(full, width, cut)
                shape = narrow(recipe.model, width)
                plain = replace(recipe, model=shape, train=replace(recipe.train, elastic_widths=()))
                alone = Trainer(TrainJob(variant=plain, seed=seed, dataset_dir=str(dataset.path)), recipe.kernels)
                alone.run_chunk(float("inf"))
                alone.save(Path(scratch) / f"alone-{width}")
                rows.append(
                    {
                        "seed": seed,
                        "width": width,
                        "params": shape.num_parameters,
                        "cut": losses(cut, dataset),
                        "alone": losses(Path(scratch) / f"alone-{width}", dataset),
                        "elastic_s": trainer.train_wall_s,
                        "alone_s": alone.train_wall_s,
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    table = [
        [
            r["width"],
            r["seed"],
            f"{r['params'] / 1e6:.3f}",
            f"{r['cut']['test']:.3f}",
            f"{r['alone']['test']:.3f}",
            f"{r['cut']['test'] - r['alone']['test']:+.3f}",
            f"{r['alone_s']:.1f}",
        ]
        for r in rows
    ]
    head = ["width", "seed", "params (M)", "test loss, cut", "test loss, alone", "difference", "time alone (s)"]
    setting = describe_setting()
    together = sum(r["alone_s"] for r in rows) / args.seeds
    one = sum(r["elastic_s"] for r in rows) / len(rows)
    text = "\n".join(
        [
            f"# One training, {len(widths)} widths, commit {setting['commit']}",
            "",
            f"`{setting['command']}`: {recipe.train.tokens:,} tokens each. The elastic training takes {one:.1f} s,"
            f" the {len(widths)} trainings alone {together:.1f} s together.",
            "",
            tabulate(table, head, tablefmt="github", disable_numparse=True),
        ]
    )
    print(write_result("elastic", {**setting, "rows": rows}, text))


if __name__ == "__main__":
    main()
