"""Held-out loss, in nats per token and in bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ryot.train.dataset import Dataset
from ryot.train.model import Decoder

#: Sequences of the split that a final loss is taken over, and that a loss on the way is.
FULL_WINDOWS = 512
QUICK_WINDOWS = 64


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


@torch.no_grad()
def evaluate(
    model: Decoder, dataset: Dataset, split: str, windows: int = FULL_WINDOWS, batch_size: int = 16
) -> HeldOut:
    """The loss over evenly spread sequences of a split, in fp32, with the model's mode kept."""
    device = model.embedding.weight.device
    ids = torch.from_numpy(dataset.windows(split, windows, model.spec.max_seq_len))
    training = model.training
    model.eval()
    total = 0.0
    for part in ids.split(batch_size):
        inputs, targets = part[:, :-1].to(device), part[:, 1:].to(device)
        logits = model(inputs)
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
    model.train(training)
    count = ids[:, 1:].numel()
    return HeldOut(total / count, bits_per_byte(total, ids[:, 1:].numpy(), dataset.byte_lengths), count)
