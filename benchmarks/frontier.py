"""What do parameters buy? Held-out loss and training time of many shapes, with one recipe and one budget.

    python benchmarks/frontier.py [--tokens 409600] [--seed 0]

Shapes of the optimized recipe at the reference preset, each trained once by itself, and one with factorized embeddings
(a table of rank R, which no Hugging Face layout of these architectures can hold, so it is made here). On the frontier
is a shape when no other has both fewer parameters and a lower loss, or both less time and a lower loss.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F
from record import describe_setting, write_result
from tabulate import tabulate
from torch import Tensor, nn

from ryot.cli.options import cache_dir
from ryot.config import VariantConfig, replace, resolve_variant
from ryot.events import EvalEvent
from ryot.train import loop
from ryot.train.corpus import load_corpus
from ryot.train.dataset import prepare_dataset
from ryot.train.loop import Trainer, TrainJob
from ryot.train.model import Cache, Decoder

#: dim, layers, heads, kv heads, ff dim, rank of the table (0: as wide as the model).
SHAPES = [
    (256, 2, 4, 2, 256, 0),
    (256, 1, 4, 2, 512, 0),
    (192, 2, 6, 2, 192, 0),
    (128, 3, 4, 2, 128, 0),
    (128, 2, 4, 4, 128, 0),
    (128, 2, 4, 2, 256, 0),
    (128, 2, 4, 2, 128, 0),
    (128, 2, 4, 1, 128, 0),
    (128, 1, 4, 2, 128, 0),
    (96, 2, 3, 1, 96, 0),
    (64, 2, 2, 1, 64, 0),
    (128, 2, 4, 2, 128, 64),
    (256, 2, 4, 2, 256, 77),
]


class FactorizedDecoder(Decoder):
    """A decoder whose table is [V, R] times [R, D]; the head goes through the same two matrices backwards."""

    rank = 0

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.embedding = nn.Embedding(self.spec.vocab_size, self.rank)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.projection = nn.Linear(self.rank, self.spec.dim, bias=False)
        nn.init.orthogonal_(self.projection.weight)

    def trunk(self, ids_BT: Tensor, table_VE: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        x_BTD, presents = self.projection(F.embedding(ids_BT, table_VE)), []
        for layer in self.layers:
            x_BTD, present = layer(x_BTD, self.rotary, None)
            presents.append(present)
        assert self.final_norm is not None
        return self.final_norm(x_BTD) @ self.projection.weight, presents


def train(variant: VariantConfig, rank: int, seed: int, dataset_dir: str) -> dict[str, Any]:
    FactorizedDecoder.rank = rank
    loop.Decoder = FactorizedDecoder if rank else Decoder  # type: ignore[misc]
    trainer = Trainer(TrainJob(variant=variant, seed=seed, dataset_dir=dataset_dir), variant.kernels)
    losses: dict[str, float] = {}
    while not trainer.done:
        for event in trainer.run_chunk(10.0):
            if isinstance(event, EvalEvent) and trainer.done:
                losses[event.split] = event.loss
    return {
        "params": sum(p.numel() for p in trainer.model.parameters()),
        "train_wall_s": trainer.train_wall_s,
        "val_loss": losses["val"],
        "test_loss": losses["test"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=409_600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = resolve_variant("optimized", "reference", tokens=args.tokens)
    dataset, _ = prepare_dataset(load_corpus(), recipe.model.vocab_size, cache_dir())
    rows = []
    for dim, layers, heads, kv_heads, ff_dim, rank in SHAPES:
        model = replace(recipe.model, dim=dim, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, ff_dim=ff_dim)
        found = train(replace(recipe, model=model), rank, args.seed, str(dataset.path))
        rows.append({"shape": (dim, layers, heads, kv_heads, ff_dim, rank), **found})
        print(rows[-1], file=sys.stderr, flush=True)

    def best(row: dict[str, Any], cost: str) -> bool:
        return not any(r[cost] < row[cost] and r["val_loss"] < row["val_loss"] for r in rows)

    table = [
        [
            *r["shape"][:5],
            r["shape"][5] or "",
            f"{r['params'] / 1e6:.3f}",
            f"{r['train_wall_s']:.1f}",
            f"{r['val_loss']:.3f}",
            f"{r['test_loss']:.3f}",
            "yes" if best(r, "params") else "",
            "yes" if best(r, "train_wall_s") else "",
        ]
        for r in rows
    ]
    head = ["dim", "layers", "heads", "kv heads", "ff dim", "rank of the table", "params (M)", "time (s)"]
    head += ["val loss", "test loss", "size-loss frontier", "time-loss frontier"]
    setting = describe_setting()
    text = "\n".join(
        [
            f"# Size, loss and time, {setting['environment']['cpu']['model']}, commit {setting['commit']}",
            "",
            f"`{setting['command']}`: {args.tokens:,} tokens each, seed {args.seed}; the spread between seeds is 0.02"
            " to 0.04 nats.",
            "",
            tabulate(table, head, tablefmt="github", disable_numparse=True),
        ]
    )
    print(write_result("frontier", {**setting, "rows": rows}, text))


if __name__ == "__main__":
    main()
