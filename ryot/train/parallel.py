"""Data-parallel training of one variant: each process takes its share of every batch, gradients are averaged.

The shares are equal, so the mean of their means is the mean over the batch: the loss is that of one process with the
same global batch but for the order of additions. Which rows a rank takes depends on the step's number alone, and every
rank holds all weights and optimizer state, so any of them could be the one that saves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ryot.config import KernelPlan
from ryot.errors import ConfigError
from ryot.train.batch import Batch
from ryot.train.loop import Trainer, TrainJob
from ryot.train.step import TrainStep

#: A rank whose peers have been silent for so long gives up.
GROUP_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The processes that train one variant together, seen from one of them."""

    rank: int
    world_size: int
    rendezvous: str
    """`file://PATH` on a path all of them see, or `tcp://HOST:PORT` where rank 0 listens."""


def check_shares(job: TrainJob, world_size: int) -> None:
    """Raise `ConfigError` when a batch has no `world_size` equal shares."""
    train = job.variant.train
    if world_size > 1 and job.variant.rlvr is not None:
        raise ConfigError(
            f"workers per variant: got {world_size}, but {job.variant.name} reinforces, which one trainer does",
            hint="give rlvr.rollout_workers for more samples per second",
        )
    if train.batch_size % (world_size * train.gradient_accumulation_steps):
        raise ConfigError(
            f"workers per variant: got {world_size}, but {job.variant.name} has a batch of {train.batch_size} sequences"
            f" in {train.gradient_accumulation_steps} micro-batches",
            hint=f"take a divisor of {train.batch_size // train.gradient_accumulation_steps}",
        )


def join_group(group: Group, plan: KernelPlan, address: str) -> None:
    """Meet the other ranks, over the network interface that has `address` and no other.

    Raises `RuntimeError` when they do not come in time.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            # Otherwise gloo listens where the host's name points, which may be none of the cluster's networks.
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
    dist.init_process_group(
        "nccl" if plan.device == "cuda" else "gloo",
        init_method=group.rendezvous,
        rank=group.rank,
        world_size=group.world_size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )


def leave_group() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


class ShardedStep(TrainStep):
    """One rank's part of a step."""

    @property
    def num_shares(self) -> int:
        return dist.get_world_size()

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        return super()._micro_batches(batch.chunk(self.num_shares)[dist.get_rank()])

    def _combine(self, loss: Tensor) -> Tensor:
        """Average gradients and loss over the ranks, in one message."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), loss.to(gradients[0])[None]])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        at = 0
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()
        return flat[-1]


class ShardedTrainer(Trainer):
    """A rank's training; all ranks must be asked for the same number of steps, and only one needs to save."""

    def _build_step(self) -> TrainStep:
        return ShardedStep(self.job.variant, self.plan)
