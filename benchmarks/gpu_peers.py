"""The peers of gpu.py, from checkouts of theirs: nanoGPT's step, and a training by nanochat's recipe."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ryot.train.dataset import Batches, Dataset
from ryot.train.evaluate import bits_per_byte

#: Tokens for each scaling parameter and tokens in a batch that nanochat's rates, at depth 12, are for.
NANOCHAT_RATIO, NANOCHAT_BATCH = 12, 2**19
NANOCHAT_DECAY = 0.28
#: Sequences that go through it at a time.
MICRO_BATCH = 32


def nanogpt_step(
    folder: Path, next_ids: Iterator[torch.Tensor], length: int, vocab_size: int
) -> tuple[Callable[[], float], float]:
    """A step as its train.py takes it, and the weights of its products.

    Autocast to bf16, compiled, fused AdamW, gradients clipped, products of float32 in TF32.
    """
    with _imported_from(folder):
        peer = importlib.import_module("model")
    config = peer.GPTConfig(block_size=length, vocab_size=vocab_size, n_layer=12, n_head=12, n_embd=768, bias=False)
    model = peer.GPT(config).to("cuda")
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=6e-4, betas=(0.9, 0.95), device_type="cuda")
    compiled = torch.compile(model)

    def step() -> float:
        ids = next(next_ids)
        x, y = (part.contiguous().pin_memory().to("cuda", non_blocking=True) for part in (ids[:, :-1], ids[:, 1:]))
        torch.backends.cuda.matmul.allow_tf32 = True
        with torch.autocast("cuda", dtype=torch.bfloat16):
            _, loss = compiled(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.backends.cuda.matmul.allow_tf32 = False
        return float(loss.item())

    # The table is the head too.
    return step, sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.transformer.wpe.weight.numel()


def train_nanochat(
    folder: Path, dataset: Dataset, seed: int, seconds: float, length: int, windows: int
) -> dict[str, Any]:
    """Its model of depth 12 by its recipe, for about `seconds` of training.

    Batch, rates and schedules follow its rules for the tokens that it gets through in that time: the best batch grows
    as tokens^0.383, rates as the root of the batch. Weight decay is the one that is given: its rule for it, made for
    trainings to the best loss, would shrink the weights of so short a one by a tenth each step. Attention is full, as
    it advises where FlashAttention 3 is missing.
    """
    with _imported_from(folder):
        peer = importlib.import_module("nanochat.gpt")
    torch.manual_seed(seed)
    config = peer.GPTConfig(
        sequence_len=length, vocab_size=dataset.vocab_size, n_layer=12, n_head=6, n_kv_head=6, n_embd=768,
        window_pattern="L",
    )  # fmt: skip
    with torch.device("meta"):
        model = peer.GPT(config)
    model.to_empty(device="cuda")
    model.init_weights()
    compiled = torch.compile(model, dynamic=False)
    counts = model.num_scaling_params()
    reference_tokens = NANOCHAT_RATIO * (counts["transformer_matrices"] + counts["lm_head"])
    micro = Batches(dataset, length=length, batch_size=MICRO_BATCH, seed=seed)

    def forward_backward(number: int, parts: int) -> torch.Tensor:
        x, y = (ids.contiguous().pin_memory().to("cuda", non_blocking=True) for ids in micro.batch(number))
        loss = compiled(x, y) / parts
        loss.backward()
        return loss.detach()

    for number in range(3):
        forward_backward(number, 1)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for number in range(10):
        forward_backward(number, 1)
    torch.cuda.synchronize()
    tokens = seconds / (time.perf_counter() - begin) * 10 * MICRO_BATCH * length
    model.zero_grad(set_to_none=True)

    batch = 2 ** round(math.log2(NANOCHAT_BATCH * (tokens / reference_tokens) ** 0.383))
    parts = max(1, batch // (MICRO_BATCH * length))
    batch = parts * MICRO_BATCH * length
    rate = math.sqrt(batch / NANOCHAT_BATCH)
    optimizer = model.setup_optimizer(
        unembedding_lr=0.008 * rate, embedding_lr=0.3 * rate, scalar_lr=0.5 * rate, matrix_lr=0.02 * rate,
        weight_decay=NANOCHAT_DECAY,
    )  # fmt: skip
    steps = max(1, int(tokens // batch))
    losses, spent = [], 0.0
    for step in range(steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        total = sum(forward_backward(step * parts + part, parts) for part in range(parts))
        _set_rates(optimizer, step, steps)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(float(total))
        if step:  # the first step compiles the optimizer's
            spent += time.perf_counter() - begin
    return {
        "bits_per_byte": _held_out(model, dataset, length, windows),
        "train_s": round(spent, 2),
        "steps": steps,
        "tokens": steps * batch,
        "batch_tokens": batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": [round(loss, 4) for loss in losses[:: max(1, steps // 50)]],
    }


def _set_rates(optimizer: Any, step: int, steps: int) -> None:
    """Warm-up over 40 steps, decay to a twentieth over the last 65 %, Muon's momentum to 0.97 and back to 0.9."""
    down = round(0.65 * steps)
    left = (steps - step) / down
    factor = min(1.0, (step + 1) / 40) if step < 40 else min(1.0, left + (1 - left) * 0.05)
    momentum = 0.85 + 0.12 * min(1.0, step / 400) if step < 400 else 0.97
    if step >= 400 and left < 1:
        momentum = 0.9 + 0.07 * left
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if group["kind"] == "muon":
            group["momentum"] = momentum
            group["weight_decay"] = NANOCHAT_DECAY * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _held_out(model: torch.nn.Module, dataset: Dataset, length: int, windows: int) -> float:
    ids = torch.from_numpy(dataset.windows("val", windows, length))
    total = 0.0
    for part in ids.split(8):
        total += float(model(part[:, :-1].contiguous().cuda(), part[:, 1:].contiguous().cuda(), loss_reduction="sum"))
    return bits_per_byte(total, ids[:, 1:].numpy(), dataset.byte_lengths)


@contextlib.contextmanager
def _imported_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
