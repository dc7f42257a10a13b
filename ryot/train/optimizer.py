"""AdamW with one learning rate per kind of parameter, and the schedule they share."""

from __future__ import annotations

import math

import torch

from ryot.config import KernelPlan, TrainConfig
from ryot.train.model import Decoder


def build_optimizer(model: Decoder, cfg: TrainConfig, plan: KernelPlan) -> torch.optim.AdamW:
    """AdamW with a group for each learning rate; a group keeps its rate as `peak_lr`.

    Groups are: tables (embedding, a tied head, positions), an untied head, outputs (the matrices that write to the
    residual stream) and all else.
    """
    rates = {
        "tables": cfg.embedding_learning_rate,
        "head": cfg.head_learning_rate,
        "outputs": cfg.learning_rate * cfg.output_rate,
        "rest": cfg.learning_rate,
    }
    groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group_of(name)].append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": rates[n], "peak_lr": rates[n]} for n, params in groups.items() if params],
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.epsilon,
        weight_decay=cfg.weight_decay,
        fused=plan.fused_optimizer or None,
    )


def _group_of(name: str) -> str:
    if name.startswith(("embedding.", "positions.")):
        return "tables"
    if name.startswith("head."):
        return "head"
    return "outputs" if name.endswith(("attn.out.weight", "down.weight")) else "rest"


def schedule_factor(cfg: TrainConfig, step: int, num_steps: int) -> float:
    """What the peak learning rates are multiplied with in step `step` (from 0) of `num_steps`; ends at about 0."""
    progress = (step + 0.5) / num_steps
    if progress < cfg.warmup_fraction:
        return progress / cfg.warmup_fraction
    if cfg.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - cfg.warmup_fraction) / (1 - cfg.warmup_fraction)))
    return min(1.0, (1 - progress) / cfg.decay_fraction) if cfg.decay_fraction else 1.0
