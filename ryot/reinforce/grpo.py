"""Group-relative policy optimization (Shao et al. 2024, DeepSeekMath): the loss of sampled answers.

    # B answers, T tokens, L tokens of the longest answer, V vocabulary

An answer's advantage is its reward beside the mean of its group, so that no value model is needed. It is on-policy: one
update a batch, unless `updates_per_batch` says otherwise; then probability ratios are clipped as PPO's are. All tokens
of a batch weigh the same (Yu et al. 2025, DAPO). What sampled them is another program than what trains, so each token
is weighted by how much less likely it was there, up to a limit: truncated importance sampling (Yao et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ryot.reinforce.rollouts import Group, Sample
from ryot.train.model import Decoder


@dataclass(frozen=True, slots=True)
class Batch:
    """Sampled answers as tensors, padded at the end."""

    ids_BT: Tensor
    """Prompt and answer."""
    answer_BT: Tensor
    """Whether the token that follows a position is one of the answer; the last position is always False."""
    sampled_BT: Tensor
    """The sampler's log probability of the token that follows, 0 elsewhere."""
    advantages_B: Tensor

    def to(self, device: str) -> Batch:
        """The same on a device."""
        return Batch(*(t.to(device) for t in (self.ids_BT, self.answer_BT, self.sampled_BT, self.advantages_B)))


def group_advantages(rewards: Sequence[Sequence[float]], *, divide_by_std: bool) -> list[list[float]]:
    """Each reward less its group's mean, divided by the group's standard deviation if asked; 0 where all are equal."""
    found = []
    for group in rewards:
        values = np.asarray(group, np.float64)
        # The mean of equal numbers need not be that number in floating point.
        centred = values - values.mean() if values.min() < values.max() else np.zeros_like(values)
        if divide_by_std and values.std() > 0:
            centred /= values.std() + 1e-6
        found.append(centred.tolist())
    return found


def build_batch(
    groups: Sequence[Group], samples: Sequence[Sequence[Sample]], advantages: Sequence[Sequence[float]]
) -> Batch | None:
    """The answers whose groups tell something: of those with equal rewards no gradient comes. None where none does."""
    rows = [
        (group.prompt_ids, sample, advantage)
        for group, members, values in zip(groups, samples, advantages, strict=True)
        if any(values)
        for sample, advantage in zip(members, values, strict=True)
    ]
    if not rows:
        return None
    longest = max(len(prompt) + len(sample.tokens) for prompt, sample, _ in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    answer = np.zeros((len(rows), longest), bool)
    sampled = np.zeros((len(rows), longest), np.float32)
    for row, (prompt, sample, _) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(sample.tokens)
        ids[row, :stop] = (*prompt, *sample.tokens)
        answer[row, start - 1 : stop - 1] = True
        sampled[row, start - 1 : stop - 1] = sample.logprobs
    advantages_B = torch.tensor([advantage for _, _, advantage in rows], dtype=torch.float32)
    return Batch(torch.from_numpy(ids), torch.from_numpy(answer), torch.from_numpy(sampled), advantages_B)


def answer_logprobs(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each answer's token: its log probability, and the entropy of what it was drawn from, both [tokens].

    Only the positions that predict an answer go through the output matrix.
    """
    table_VE = model.table_VE
    h_BTD, _ = model.trunk(batch.ids_BT, table_VE)
    bias = None if model.head is None else model.head.bias
    logits_NV = F.linear(h_BTD[batch.answer_BT], model.head_weight_VE(table_VE), bias).float()
    logprobs_NV = logits_NV.log_softmax(-1)
    targets_N = batch.ids_BT.roll(-1, dims=1)[batch.answer_BT]
    entropy_N = -(logprobs_NV.detach().exp() * logprobs_NV.detach()).sum(-1)
    return logprobs_NV.gather(-1, targets_N[:, None])[:, 0], entropy_N


class Weights(NamedTuple):
    """How a policy loss is put together."""

    clip_low: float
    clip_high: float
    kl: float
    """Weight of the divergence from the reference model."""
    importance_limit: float
    """Of how many times more likely a token may count as in training than when it was sampled."""


class PolicyLoss(NamedTuple):
    """A loss and what it was made of, means over tokens."""

    loss: Tensor
    kl: float
    clipped: float
    """Share of tokens whose ratio was clipped."""


def policy_loss(
    logprobs_N: Tensor,
    old_N: Tensor,
    sampled_N: Tensor,
    advantages_N: Tensor,
    weights: Weights,
    reference_N: Tensor | None = None,
    count: int | None = None,
) -> PolicyLoss:
    """GRPO's loss of tokens: clipped ratios times advantages, corrected for the sampler, plus KL where asked for.

    `old_N` is what training's own model gave when the batch began, `sampled_N` what the sampler did; with one update a
    batch the ratio is 1 and its gradient that of log probability. `count` is what sums are divided by: the tokens of
    the whole batch, where it comes in parts.
    """
    count = count or len(logprobs_N)
    ratio_N = (logprobs_N - old_N).exp()
    clipped_N = ratio_N.clamp(1 - weights.clip_low, 1 + weights.clip_high)
    objective_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    importance_N = (old_N - sampled_N).exp().clamp(max=weights.importance_limit)
    loss = -(importance_N * objective_N).sum() / count
    kl = 0.0
    if reference_N is not None and weights.kl:
        # Schulman's k3: not below 0 in any sample, right on average.
        log_ratio_N = reference_N - logprobs_N
        kl_N = log_ratio_N.exp() - log_ratio_N - 1
        loss = loss + weights.kl * kl_N.sum() / count
        kl = float(kl_N.detach().sum() / count)
    clipped = float((ratio_N != clipped_N).float().sum() / count)
    return PolicyLoss(loss, kl, clipped)
