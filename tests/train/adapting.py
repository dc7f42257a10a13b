"""What tests of adapting share: recipes that start from a tiny checkpoint of `tests.models.checkpoints`."""

from __future__ import annotations

import json
from pathlib import Path

from ryot.config import VariantConfig, resolve_variant

LENGTH = 24

TRAIN = """
summary = "tiny"
[train]
tokens = {tokens}
sequence_length = {length}
batch_size = 4
learning_rate = 5e-3
embedding_learning_rate = 1e-3
head_learning_rate = 1e-3
warmup_fraction = 0.1
schedule = "linear-decay"
"""


def adapted(
    folder: Path, source: Path | str, tables: str = "", *, steps: int = 8, length: int = LENGTH
) -> VariantConfig:
    """The recipe `folder/tiny.toml`, written here: it starts from `source` and has `tables` besides."""
    path = folder / "tiny.toml"
    text = TRAIN.format(tokens=steps * 4 * length, length=length)
    path.write_text(f'{text}\n[init]\nfrom = "{source}"\n{tables}')
    return resolve_variant(str(path), "reference")


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, object]]:
    """Prompts and completions that a model can learn: sums of small numbers."""
    return [{"prompt": f"{i}+{i % 7}=", "completion": f" {i + i % 7}"} for i in range(count)]
