"""Where a training's steps are computed, and how before anything is measured there."""

from __future__ import annotations

import torch

from ryot.config import Device, DeviceChoice, KernelPlan, VariantConfig, replace
from ryot.errors import ConfigError


def choose_device(asked: DeviceChoice) -> Device:
    """The device of this machine for `asked`; `auto` is a GPU where there is one.

    Raises `ConfigError` for a GPU that torch does not see.
    """
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise ConfigError("device: got 'cuda', but torch sees no CUDA device here", hint="use --device cpu")
    if asked == "auto":
        return "cuda" if has_gpu else "cpu"
    return asked


def asked_device(variant: VariantConfig, asked: DeviceChoice) -> DeviceChoice:
    """What `asked` means for a recipe: one that names a GPU itself does not go without."""
    return "cuda" if asked == "auto" and variant.kernels.device == "cuda" else asked


def place_kernels(variant: VariantConfig, device: Device, threads: int) -> KernelPlan:
    """How a recipe's steps begin on a device: what tuning starts from, and what is used without it.

    A recipe's kernels are for the device that they name, by default the CPU. On a GPU products are then in bf16,
    attention and AdamW are torch's fused kernels, and all logits are made at once; the baseline and reinforcement,
    which are what they are, keep theirs. Compiling is left to tuning, which knows whether it pays.
    """
    plan = replace(variant.kernels, device=device, threads=threads)
    adapts = variant.init is not None and variant.rlvr is None
    if device == "cpu" or variant.kernels.device == device or not (variant.tune or adapts):
        return plan
    return replace(plan, dtype="bf16", attention="sdpa", loss_chunk=0, fused_optimizer=True)
