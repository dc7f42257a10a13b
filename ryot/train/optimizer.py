"""AdamW with one learning rate per kind of parameter, and the schedule they share."""

from __future__ import annotations

import math

import torch

from ryot.config import KernelPlan, TrainConfig
from ryot.train.model import Decoder


def build_optimizer(model: Decoder, cfg: TrainConfig, plan: KernelPlan) -> torch.optim.AdamW:
    """AdamW over groups embedding (tables, tied head), head and matrices (all else); each group keeps its `peak_lr`."""
    tables: list[torch.nn.Parameter] = []
    head: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        kind = name.split(".")[0]
        (tables if kind in ("embedding", "positions") else head if kind == "head" else rest).append(parameter)
    groups = [
        {"params": params, "lr": rate, "peak_lr": rate}
        for params, rate in (
            (tables, cfg.embedding_learning_rate),
            (head, cfg.head_learning_rate),
            (rest, cfg.learning_rate),
        )
        if params
    ]
    return torch.optim.AdamW(
        groups,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.epsilon,
        weight_decay=cfg.weight_decay,
        fused=plan.fused_optimizer or None,
    )


def schedule_factor(cfg: TrainConfig, step: int, num_steps: int) -> float:
    """What the peak learning rates are multiplied with in step `step` (from 0) of `num_steps`; ends at about 0."""
    progress = (step + 0.5) / num_steps
    if progress < cfg.warmup_fraction:
        return progress / cfg.warmup_fraction
    if cfg.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - cfg.warmup_fraction) / (1 - cfg.warmup_fraction)))
    return min(1.0, (1 - progress) / cfg.decay_fraction) if cfg.decay_fraction else 1.0
