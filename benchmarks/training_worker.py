"""One training of `training.py`, in a process of its own: reads a job as JSON, prints the result as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import minimal_gpt
import torch
import torch.nn.functional as F

from ryot.config import KernelPlan, VariantConfig, build_from_mapping, resolve_variant, to_mapping
from ryot.events import EvalEvent
from ryot.optimize.kernels import choose_kernels
from ryot.train.dataset import Batches, Dataset, load_dataset
from ryot.train.evaluate import FULL_WINDOWS, QUICK_WINDOWS
from ryot.train.loop import Trainer, TrainJob
from ryot.train.model import Decoder
from ryot.train.optimizer import schedule_factor

CURVE_POINTS = 8


def train(job: dict[str, Any]) -> dict[str, Any]:
    """A ryot variant with its own budget, or `tokens`."""
    variant = resolve_variant(job["case"], job["preset"], tokens=job.get("tokens"))
    plan = build_from_mapping(KernelPlan, job["plan"], "plan") if job.get("plan") else variant.kernels
    trainer = Trainer(TrainJob(variant=variant, seed=job["seed"], dataset_dir=job["dataset"]), plan)
    cpu_s = change_trainer(trainer, job)
    curve, final = [], {}
    while not trainer.done:
        for event in trainer.run_chunk(5.0):
            if isinstance(event, EvalEvent) and trainer.done and event.step == trainer.num_steps:
                final[event.split] = event.loss
            elif isinstance(event, EvalEvent):
                curve.append([event.tokens, round(event.train_wall_s, 3), round(event.loss, 4)])
    return {
        "val_loss": final["val"],
        "test_loss": final["test"],
        "params": variant.model.num_parameters,
        "tokens": trainer.tokens,
        "train_wall_s": trainer.train_wall_s,
        "train_cpu_s": sum(cpu_s),
        "compile_s": trainer.compile_s,
        "curve": curve,
    }


class MuonBesideAdamW:
    """torch's Muon for the matrices inside the layers, the recipe's AdamW for all else.

    Of matrices that are stored as one (query, key and value; gate and up) each is orthogonalized on its own.
    """

    def __init__(self, trainer: Trainer, rate: float):
        spec = trainer.job.variant.model.spec
        packed = {"qkv": [spec.q_dim, spec.kv_dim, spec.kv_dim], "gate_up": [spec.ff_dim, spec.ff_dim]}
        self._adamw = trainer._take_step.optimizer
        #: Each with the matrices in it, which share its memory.
        self._parts: dict[torch.nn.Parameter, list[torch.nn.Parameter]] = {}
        for name, whole in trainer.model.named_parameters():
            if name.startswith("layers.") and whole.ndim == 2:
                rows = packed.get(name.split(".")[-2], [len(whole)])
                self._parts[whole] = [torch.nn.Parameter(part) for part in whole.data.split(rows)]
        for group in self._adamw.param_groups:
            group["params"] = [p for p in group["params"] if p not in self._parts]
        # Updates are of the size of AdamW's, so that rates are of one kind; no decay, as in the recipe.
        matrices = [part for parts in self._parts.values() for part in parts]
        self._muon = torch.optim.Muon(
            [{"params": matrices, "peak_lr": rate}], lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self.param_groups = [*self._adamw.param_groups, *self._muon.param_groups]

    def step(self) -> None:
        self._adamw.step()
        for whole, parts in self._parts.items():
            assert whole.grad is not None
            for part, gradient in zip(parts, whole.grad.split([len(p) for p in parts])):
                part.grad = gradient
        self._muon.step()

    def zero_grad(self, *, set_to_none: bool) -> None:
        self._adamw.zero_grad(set_to_none)
        for whole in self._parts:
            whole.grad = None


class ShortFirst:
    """The same tokens in the same steps, in the first of them as more sequences of a shorter length."""

    def __init__(self, batches: Any, length: int, until: float):
        self._batches, self._length, self._until = batches, length, until

    def batch(self, step: int) -> tuple[torch.Tensor, ...]:
        tensors: tuple[torch.Tensor, ...] = self._batches.batch(step)
        return tuple(t.view(-1, self._length) for t in tensors) if step < self._until else tensors


def change_trainer(trainer: Trainer, job: dict[str, Any]) -> list[float]:
    """Apply what a case changes on the recipe; returns a list that each step's CPU seconds are added to."""
    if "muon_rate" in job:
        trainer._take_step.optimizer = MuonBesideAdamW(trainer, job["muon_rate"])  # type: ignore[assignment]
    if "short_share" in job:
        length = trainer.job.variant.sequence_length // job["short_divisor"]
        trainer._batches = ShortFirst(trainer._batches, length, job["short_share"] * trainer.num_steps)  # type: ignore[assignment]
    take, cpu_s = trainer._take_step.take, []

    def timed(*arguments: Any) -> tuple[float, float]:
        begin = time.process_time()
        answer = take(*arguments)
        cpu_s.append(time.process_time() - begin)
        return answer

    trainer._take_step.take = timed  # type: ignore[method-assign]
    return cpu_s


def step_costs(job: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of a token in each of the cases, their steps taken in turn; others may use the machine meanwhile."""
    variant = resolve_variant(job["case"], job["preset"])
    data = TrainJob(variant=variant, seed=0, dataset_dir=job["dataset"])
    seconds: dict[str, list[float]] = {}
    trainers = {}
    for name, changes in job["cases"].items():
        trainers[name] = trainer = Trainer(data, variant.kernels)
        trainer.evaluate = lambda *_: None  # type: ignore[method-assign]
        # A case of short sequences is timed in them alone.
        seconds[name] = change_trainer(trainer, changes | ({"short_share": 1.0} if "short_share" in changes else {}))
    for _ in range(job["steps"]):
        for trainer in trainers.values():
            trainer.run_chunk(60.0, 1)
    token_s = {name: statistics.median(found) / variant.step_tokens for name, found in seconds.items()}
    for name, changes in job["cases"].items():
        share = changes.get("short_share", 1.0)
        token_s[name] = share * token_s[name] + (1 - share) * token_s["AdamW"]
    return {"token_cpu_s": token_s, "step_cpu_s": seconds}


def train_gpt(job: dict[str, Any]) -> dict[str, Any]:
    """The minimal GPT, written out."""
    dataset = load_dataset(Path(job["dataset"]))
    torch.manual_seed(job["seed"])
    model = minimal_gpt.GPT()
    optimizer = minimal_gpt.build_optimizer(model)
    batches = Batches(dataset, length=minimal_gpt.CONTEXT, batch_size=minimal_gpt.BATCH, seed=job["seed"])
    step_tokens = minimal_gpt.BATCH * minimal_gpt.CONTEXT
    steps = job["tokens"] // step_tokens
    curve, wall_s = [], 0.0
    for step in range(steps):
        if step * CURVE_POINTS // steps > (step - 1) * CURVE_POINTS // steps:
            loss = held_out(model, dataset, "val", QUICK_WINDOWS)
            curve.append([step * step_tokens, round(wall_s, 3), round(loss, 4)])
        begin = time.perf_counter()
        inputs, targets = batches.batch(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = minimal_gpt.learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        wall_s += time.perf_counter() - begin
    return {
        "val_loss": held_out(model, dataset, "val", FULL_WINDOWS),
        "test_loss": held_out(model, dataset, "test", FULL_WINDOWS),
        "params": sum(p.numel() for p in model.parameters()),
        "tokens": steps * step_tokens,
        "train_wall_s": wall_s,
        "compile_s": 0.0,
        "curve": curve,
    }


@torch.no_grad()
def held_out(model: torch.nn.Module, dataset: Dataset, split: str, windows: int) -> float:
    ids = torch.from_numpy(dataset.windows(split, windows, minimal_gpt.CONTEXT))
    total = sum(
        F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        for part in ids.split(16)
    )
    return total / ids[:, 1:].numel()


def tune(job: dict[str, Any]) -> dict[str, Any]:
    """The machine's choice of kernels, with the time that choosing took."""
    variant = resolve_variant(job["case"], job["preset"])
    begin = time.perf_counter()
    decision = choose_kernels(variant, load_dataset(Path(job["dataset"])), Path(job["cache"]))
    return {
        "tune_s": time.perf_counter() - begin,
        "plan": to_mapping(decision.plan),
        "candidates": [[c.changed, round(c.step_ms, 2), c.verdict] for c in decision.candidates],
    }


class PlainLoop:
    """The optimized variant's step as one would write it by hand for this one model: no events, gates or config."""

    def __init__(self, variant: VariantConfig, plan: KernelPlan):
        torch.manual_seed(0)
        train = variant.train
        self.variant = variant
        self.model = model = Decoder(variant.model.spec, plan.attention).train()
        model.normalize_embedding = train.normalize_embedding
        model.start_final_norm(train.final_norm_init, alternate=train.alternate_final_norm)
        out = [p for n, p in model.named_parameters() if n.endswith(("attn.out.weight", "down.weight"))]
        rest = [
            p
            for n, p in model.named_parameters()
            if not n.endswith(("attn.out.weight", "down.weight")) and not n.startswith("embedding")
        ]
        self.peaks = [train.embedding_learning_rate, train.learning_rate * train.output_rate, train.learning_rate]
        self.optimizer = torch.optim.AdamW(
            [{"params": [model.embedding.weight]}, {"params": out}, {"params": rest}],
            betas=(train.beta1, train.beta2),
            eps=train.epsilon,
            weight_decay=train.weight_decay,
            fused=True,
        )

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, step: int) -> float:
        factor = schedule_factor(self.variant.train, step, self.variant.num_steps)
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.variant.train.max_grad_norm)
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def framework_tax(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of the Trainer, with the same kernels as the plain loop and with those chosen, and of the plain loop, in
    turn; seconds per step of each, and the losses of the first two, which must be equal."""
    variant = resolve_variant(job["case"], job["preset"])
    same = KernelPlan(attention=job["plan"]["attention"], fused_optimizer=True)
    chosen = build_from_mapping(KernelPlan, job["plan"], "plan")
    data = TrainJob(variant=variant, seed=0, dataset_dir=job["dataset"])
    trainers = {"trainer": Trainer(data, same), "trainer, chosen kernels": Trainer(data, chosen)}
    plain = PlainLoop(variant, same)
    batches = Batches(
        load_dataset(Path(job["dataset"])),
        length=variant.model.max_seq_len,
        batch_size=variant.train.batch_size,
        seed=0,
    )
    for trainer in trainers.values():
        trainer.evaluate = lambda *_: None  # type: ignore[method-assign]
    seconds: dict[str, list[float]] = {"plain": [], **{name: [] for name in trainers}}
    losses = []
    for step in range(job["steps"]):
        begin = time.perf_counter()
        losses.append(plain.step(*batches.batch(step), step))
        seconds["plain"].append(time.perf_counter() - begin)
        for name, trainer in trainers.items():
            begin = time.perf_counter()
            trainer.run_chunk(60.0, 1)
            seconds[name].append(time.perf_counter() - begin)
    weights = zip(plain.model.parameters(), trainers["trainer"].model.parameters())
    return {"seconds": seconds, "equal_weights": all(torch.equal(a, b) for a, b in weights), "last_loss": losses[-1]}


KINDS = {"train": train, "gpt": train_gpt, "tune": tune, "tax": framework_tax, "costs": step_costs}

if __name__ == "__main__":
    torch.set_num_threads(1)
    work = json.loads(sys.argv[1])
    print(json.dumps(KINDS[work["kind"]](work)))
