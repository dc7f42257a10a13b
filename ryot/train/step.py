"""One optimizer step: a model, its loss under a kernel plan, gradients, and what the optimizer makes of them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ryot.config import KernelPlan, VariantConfig
from ryot.train.batch import Batch
from ryot.train.elastic import NarrowModel
from ryot.train.initial import build_initial
from ryot.train.loss import SoftTargets, cross_entropy
from ryot.train.optimizer import build_optimizer
from ryot.train.rounding import WeightRounding

P = ParamSpec("P")
T = TypeVar("T")


class TrainStep:
    """A new model and the computation of one optimizer step under a kernel plan; tuning times it on its own."""

    def __init__(self, variant: VariantConfig, plan: KernelPlan):
        self.variant, self.plan = variant, plan
        train = variant.train
        self.model = model = build_initial(variant, plan.attention).to(plan.device)
        if variant.init is None:
            model.start_final_norm(train.final_norm_init, alternate=train.alternate_final_norm)
        model.checkpoint_activations = train.checkpoint_activations
        model.normalize_embedding = train.normalize_embedding
        self.optimizer = build_optimizer(model, train, plan)
        self._trunk = self._compiled(model.trunk) if plan.compile else model.trunk
        # All logits at once pass through memory many times unless they are one kernel; chunks are made not to.
        whole = plan.compile and not plan.loss_chunk
        self._cross_entropy = self._compiled(cross_entropy) if whole else cross_entropy
        self._narrow = [NarrowModel(model, width, plan.attention) for width in train.elastic_widths]
        self.scaler = torch.amp.GradScaler(plan.device, enabled=plan.dtype == "fp16")
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._rounding = WeightRounding(model, variant.rounding) if variant.rounding else None

    def _compiled(self, function: Callable[P, T]) -> Callable[P, T]:
        # A small step is over on a GPU before its kernels are launched one by one, so they are launched as one graph.
        # Its gradients lie where the next pass writes, which a sum over several passes does not allow, and it reads
        # weights where they were, which rounding puts others in the place of.
        train = self.variant.train
        once = train.gradient_accumulation_steps == 1 and not train.elastic_widths and self.variant.rounding is None
        graphs = self.plan.device == "cuda" and once and self.num_shares == 1
        compiled: Callable[P, T] = torch.compile(function, dynamic=False, mode="reduce-overhead" if graphs else None)
        return compiled

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss in nats per learned token, under the plan's autocast."""
        with self._cast():
            table_VE = self.model.table_VE
            h_BTD, _ = self._trunk(batch.inputs_BT, table_VE, None, batch.documents_BT)
            h_RD, targets_R, soft = h_BTD.flatten(0, 1), batch.targets_BT.flatten(), None
            loss_of = self._cross_entropy
            if batch.taught_ids_BTS is not None and batch.taught_BTS is not None:
                assert self.variant.distill is not None
                taught = batch.taught_ids_BTS.flatten(0, 1), batch.taught_BTS.flatten(0, 1)
                soft = SoftTargets(*taught, self.variant.distill.weight)
            if batch.documents_BT is not None:
                # Logits are the dearest rows of a large vocabulary: only those that are learned from are made.
                kept_R = (targets_R >= 0).nonzero()[:, 0]
                h_RD, targets_R, soft = h_RD[kept_R], targets_R[kept_R], soft and soft.rows(kept_R)
                loss_of = cross_entropy  # of another number of rows each time, for which nothing is compiled
            return loss_of(h_RD, self.model.head_weight_VE(table_VE), targets_R, self.plan.loss_chunk, soft)

    def rounded(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Within the block the weights are those that step `step` computes with: rounded in the last phase."""
        if self._rounding is None or self.variant.rounding is None:
            return contextlib.nullcontext()
        begins = (1 - self.variant.rounding.share) * self.variant.num_steps
        return self._rounding.applied() if step >= begins else contextlib.nullcontext()

    def narrow_loss(self, narrow: NarrowModel, batch: Batch) -> Tensor:
        """The same of a narrower model inside this one."""
        with self._cast():
            logits_BTV = narrow(batch.inputs_BT, batch.documents_BT)
            return F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.targets_BT.flatten())

    def _cast(self) -> contextlib.AbstractContextManager[object]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.plan.dtype)
        return torch.autocast(self.plan.device, dtype=dtype) if dtype else contextlib.nullcontext()

    def warm_up(self, inputs_BT: Tensor, targets_BT: Tensor, documents_BT: Tensor | None = None) -> float:
        """Run forward and backward once, without a step, so that all compiling is done; returns the seconds it took."""
        begin = time.perf_counter()
        for micro in self._micro_batches(Batch(inputs_BT, targets_BT, documents_BT))[:1]:
            self.loss(micro).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor, lr_factor: float, step: int = 0) -> tuple[float, float]:
        """Take one step on whole sequences of text, as `take` does."""
        return self.take(Batch(inputs_BT, targets_BT), lr_factor, step)

    def take(self, batch: Batch, lr_factor: float, step: int) -> tuple[float, float]:
        """Take one step; returns its loss (at full width) and its gradient norm before clipping.

        `step`, the step's number, says which of the narrower models has its turn, and whether weights are rounded.
        """
        micro, learned = self._micro_batches(batch), batch.num_learned
        losses: list[Tensor] = []
        with self.rounded(step):
            for part in micro:
                # The mean is over what the whole batch has to learn, wherever it stands.
                share = 1 / len(micro) if learned is None else (part.num_learned or 0) * self.num_shares / learned
                loss = self.loss(part) * share
                self.scaler.scale(loss).backward()
                losses.append(loss.detach())
                if self._narrow:
                    narrow = self._narrow[step % len(self._narrow)]
                    self.scaler.scale(self.narrow_loss(narrow, part) * share).backward()
        loss = self._combine(torch.stack(losses).double().sum())
        norm = self.apply(lr_factor)
        # Read when a GPU has been given the whole step, or it would wait for this process in the middle of it.
        return loss.item(), norm

    def apply(self, lr_factor: float) -> float:
        """Take a step with the gradients that there are; returns their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.variant.train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled() and not math.isfinite(norm.item()):
            return 0.0  # a step that overflowed in fp16: the scaler skips it and takes a smaller scale
        return norm.item()

    def _combine(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch; `ryot.train.parallel` also makes the gradients those of the whole batch here."""
        return loss

    @property
    def num_shares(self) -> int:
        """Processes that a batch is shared between."""
        return 1

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        parts = batch.chunk(self.variant.train.gradient_accumulation_steps)
        return [part.to(self.plan.device) for part in parts]
