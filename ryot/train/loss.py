"""Cross-entropy of the next token, whole or in chunks of rows so that the logits stay in cache.

# R rows (batch x time), D model dim, V vocabulary, S tokens that a teacher gives probabilities of
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ryot.train.functions import Context


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """Probabilities that a teacher gives to some tokens of each row, summing to 1, and their share in the target."""

    ids_RS: Tensor
    probabilities_RS: Tensor
    weight: float

    def rows(self, kept_R: Tensor) -> SoftTargets:
        """Those of some rows."""
        return SoftTargets(self.ids_RS[kept_R], self.probabilities_RS[kept_R], self.weight)


class CountedContext(Context, Protocol):
    rows: int


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `h @ W.T`; the gradients are made in the forward pass, chunk by chunk.

    No more than `chunk` rows of logits exist at a time, in one array that is softmax and gradient too, and each is
    read while it is still in cache. All of it is in `h`'s type, in bf16 with sums in fp32: the gradient of the logits
    would be rounded to that type anyway, and a probability rounded to 8 bits moves the mean loss by 1e-4 nats.
    """

    @staticmethod
    def forward(
        ctx: CountedContext, h_RD: Tensor, W_VD: Tensor, targets_R: Tensor, chunk: int, soft: SoftTargets | None
    ) -> Tensor:
        rows = h_RD.shape[0]
        W = W_VD.detach().to(h_RD.dtype)
        dh_RD = torch.empty_like(h_RD)
        # A frozen matrix, beside adapters, has no gradient: a third of the work here.
        dW_VD = torch.zeros_like(W_VD) if ctx.needs_input_grad[1] else None
        total = h_RD.new_zeros((), dtype=torch.float32)
        # Made once: an array of its own for each chunk would never be in cache.
        buffer = h_RD.new_empty((min(chunk, rows), len(W)))
        tiny = torch.finfo(h_RD.dtype).tiny
        # Where each row of a chunk begins in the flat buffer. torch's scatter of bf16 passes over the whole array.
        row_starts = torch.arange(len(buffer), device=h_RD.device) * len(W)
        hard = 1.0 if soft is None else 1.0 - soft.weight
        minus_hard = h_RD.new_full((len(buffer),), -hard)
        for start in range(0, rows, chunk):
            h = h_RD[start : start + chunk]
            target = row_starts[: len(h)] + targets_R[start : start + chunk]
            logits = torch.mm(h, W.t(), out=buffer[: len(h)])
            weights = torch.softmax(logits, dim=1, out=logits)
            # A probability that the type cannot hold counts as its smallest number: 87 nats, far above every gate.
            nats = weights.take(target).float().clamp_min_(tiny).log_()
            if soft is None:
                total -= nats.sum()
            else:
                taught = row_starts[: len(h), None] + soft.ids_RS[start : start + chunk]
                share = soft.probabilities_RS[start : start + chunk].to(h.dtype) * soft.weight
                total -= hard * nats.sum()
                total -= (weights.take(taught).float().clamp_min_(tiny).log_() * share).sum()
                weights.put_(taught, -share, accumulate=True)
            # d loss / d logits = softmax - one hot; the mean over rows is taken in `backward`.
            d_logits = weights.put_(target, minus_hard[: len(h)], accumulate=True)
            torch.mm(d_logits, W, out=dh_RD[start : start + chunk])
            if dW_VD is None:
                continue
            if h.dtype == dW_VD.dtype:
                dW_VD.addmm_(d_logits.t(), h)
            else:
                dW_VD += d_logits.t() @ h
        ctx.save_for_backward(dh_RD, dW_VD)
        ctx.rows = rows
        return total / rows

    @staticmethod
    def backward(ctx: CountedContext, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        dh_RD, dW_VD = ctx.saved_tensors
        scale = grads[0] / ctx.rows
        return dh_RD * scale.to(dh_RD.dtype), None if dW_VD is None else dW_VD * scale, None, None, None


def cross_entropy(
    h_RD: Tensor, W_VD: Tensor, targets_R: Tensor, chunk: int = 0, soft: SoftTargets | None = None
) -> Tensor:
    """Mean loss in nats per token of predicting `targets_R` from `h_RD @ W_VD.T`.

    With `soft`, of predicting the mixture of the target and the teacher's probabilities. `chunk` is the number of rows
    of logits made at a time in training, 0 for all at once; fp16, in which a probability below 6e-5 has no full
    precision, always makes all at once and takes the softmax in fp32.
    """
    device = h_RD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_RD.dtype
    if chunk and torch.is_grad_enabled() and dtype != torch.float16:
        return _ChunkedCrossEntropy.apply(h_RD.to(dtype), W_VD, targets_R, chunk, soft)  # type: ignore[no-any-return,no-untyped-call]
    logits = F.linear(h_RD, W_VD).float()
    if soft is None:
        return F.cross_entropy(logits, targets_R)
    taught = -(F.log_softmax(logits, dim=-1).gather(1, soft.ids_RS) * soft.probabilities_RS).sum(dim=1).mean()
    return (1 - soft.weight) * F.cross_entropy(logits, targets_R) + soft.weight * taught
