"""Held-out loss, in nats per token and in bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ryot.config import VariantConfig
from ryot.train.dataset import Dataset
from ryot.train.model import Decoder
from ryot.train.packing import PackedSequences

#: Sequences of the split that a final loss is taken over, and that a loss on the way is.
FULL_WINDOWS = 512
QUICK_WINDOWS = 64
#: Share of a training's tokens that these take at most where it starts from a checkpoint.
QUICK_SHARE, FULL_SHARE = 0.02, 0.1
#: Logits made at a time, and tokens that go through the decoder at a time.
_MAX_LOGITS, _MAX_TOKENS = 1 << 24, 1 << 11


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A loss on text that was not trained on."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    tokens: int


def bits_per_byte(total_nats: float, targets: np.ndarray, byte_lengths: np.ndarray) -> float:
    """The summed loss over the bytes of text that the targets stand for."""
    return total_nats / math.log(2) / float(byte_lengths[targets].sum())


def window_counts(variant: VariantConfig) -> tuple[int, int]:
    """Sequences of a loss on the way and of a final one.

    A short training of a large model would be spent on losses: those take at most a share of its tokens.
    """
    if variant.init is None:
        return QUICK_WINDOWS, FULL_WINDOWS
    budget = variant.train.tokens / variant.sequence_length
    quick = max(4, round(QUICK_SHARE * budget))
    full = max(16, round(FULL_SHARE * budget))
    return min(QUICK_WINDOWS, quick), min(FULL_WINDOWS, full)


@torch.no_grad()
def evaluate(
    model: Decoder,
    dataset: Dataset,
    split: str,
    windows: int = FULL_WINDOWS,
    batch_size: int = 16,
    length: int | None = None,
) -> HeldOut:
    """The loss over evenly spread sequences of a split, of records over their answers, in fp32.

    The model's mode is kept.
    """
    device = model.embedding.weight.device
    documents: Tensor | None = None
    length = length or model.spec.max_seq_len
    if dataset.has_records:
        inputs, targets, documents = PackedSequences(dataset, split, length).spread(windows)
    else:
        ids = torch.from_numpy(dataset.windows(split, windows, length))
        inputs, targets = ids[:, :-1], ids[:, 1:]
    training = model.training
    model.eval()
    total = 0.0
    # Logits of all rows of a batch would take gigabytes of a large vocabulary.
    rows = max(1, _MAX_LOGITS // model.spec.vocab_size)
    batch_size = max(1, min(batch_size, _MAX_TOKENS // length))
    for at in range(0, len(inputs), batch_size):
        part = slice(at, at + batch_size)
        of_part = None if documents is None else documents[part].to(device)
        x_BTE, _ = model.trunk(inputs[part].to(device), model.table_VE, documents_BT=of_part, keep_cache=False)
        y = targets[part].flatten().to(device)
        kept = (y >= 0).nonzero()[:, 0] if documents is not None else None
        x = x_BTE.flatten(0, 1)
        x, y = (x, y) if kept is None else (x[kept], y[kept])
        for x_RE, y_R in zip(x.split(rows), y.split(rows)):
            total += F.cross_entropy(model.logits(x_RE).float(), y_R, reduction="sum").item()
    model.train(training)
    learned = targets[targets >= 0]
    return HeldOut(
        total / learned.numel(), bits_per_byte(total, learned.numpy(), dataset.byte_lengths), learned.numel()
    )
