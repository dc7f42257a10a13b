"""SemanticCompressor: a smaller model at the same held-out loss, or several sizes out of one training.

What makes `optimized` smaller is in its recipe: one table for embedding and head, half the width, grouped-query heads,
a narrow feed-forward layer; `benchmarks/frontier.py` measures what each size costs in loss and time, factorized
embeddings too, which no Hugging Face layout of these architectures can hold. What is here cuts a checkpoint of an
elastic training (`ryot.train.elastic`) to one of the widths that it was trained for.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F

from ryot.errors import ConfigError
from ryot.models.spec import DecoderSpec, narrow_spec
from ryot.train.checkpoint import load_model, load_tokenizer, load_training_state, save_checkpoint
from ryot.train.elastic import slice_state


def slice_checkpoint(checkpoint: Path, width: int, output: Path) -> DecoderSpec:
    """Write the model of `width` inside `checkpoint` as a checkpoint of its own; returns its shape.

    It has no training state: it is to be exported, not trained further. Raises `ConfigError` for a width that the
    checkpoint was not trained for and `CheckpointError` for a checkpoint that cannot be read.
    """
    recipe = load_training_state(checkpoint)[0]["identity"]["variant"]["train"]
    widths = recipe.get("elastic_widths", [])
    if width not in widths:
        can_be = f"one of {sorted(widths)}" if widths else "none: this checkpoint was not trained to be cut"
        raise ConfigError(
            f"width: got {width}, expected {can_be}", hint="train with elastic_widths, as variants/elastic.toml does"
        )
    model = load_model(checkpoint)
    narrow = narrow_spec(model.spec, width)
    state = slice_state(model.spec, narrow, {name: p.detach() for name, p in model.named_parameters()})
    if recipe["normalize_embedding"]:
        state["embedding.weight"] = F.rms_norm(state["embedding.weight"], (width,))
    save_checkpoint(
        output, spec=narrow, state=state, tokenizer_json=load_tokenizer(checkpoint).to_str(pretty=True).encode()
    )
    return narrow
