from __future__ import annotations

import math
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ryot.config import KernelPlan, VariantConfig, replace
from ryot.errors import CheckpointError, RyotError, TrainingError
from ryot.events import EvalEvent, StepEvent
from ryot.train.checkpoint import checkpoint_digest, load_model
from ryot.train.dataset import Batches, Dataset
from ryot.train.evaluate import evaluate
from ryot.train.gates import GateBreach, check_step
from ryot.train.loop import Trainer, TrainJob
from ryot.train.loss import cross_entropy
from ryot.train.optimizer import schedule_factor
from tests.conftest import CONTEXT, VOCAB_SIZE, tiny_variant


def make_job(dataset: Dataset, variant: VariantConfig, seed: int = 0) -> TrainJob:
    return TrainJob(variant=variant, seed=seed, dataset_dir=str(dataset.path))


def run(trainer: Trainer) -> list[float]:
    losses = []
    while not trainer.done:
        losses += [e.loss for e in trainer.run_chunk(60, 1) if isinstance(e, StepEvent)]
    return losses


FP32 = KernelPlan(attention="explicit", fused_optimizer=True)
BF16 = replace(FP32, dtype="bf16", loss_chunk=64)


@pytest.mark.parametrize("plan", [KernelPlan(), BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["baseline", "optimized"])
def test_same_seed_gives_bit_identical_losses_and_weights(name: str, plan: KernelPlan, dataset: Dataset) -> None:
    first, second = (Trainer(make_job(dataset, tiny_variant(name)), plan) for _ in range(2))
    assert run(first) == run(second)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))


@pytest.mark.parametrize("name", ["baseline", "optimized"])
@pytest.mark.parametrize(("stop", "plan"), [(1, FP32), (5, FP32), (5, BF16), (11, FP32)])
def test_resume_is_bit_identical_to_never_having_stopped(
    name: str, stop: int, plan: KernelPlan, dataset: Dataset, tmp_path: Path
) -> None:
    job = make_job(dataset, tiny_variant(name))
    whole = Trainer(job, plan)
    run(whole)
    stopped = Trainer(job, plan)
    for _ in range(stop):
        stopped.run_chunk(60, 1)
    stopped.save(tmp_path / "half")
    torch.manual_seed(99)
    resumed = Trainer.resume(job, plan, tmp_path / "half")
    run(resumed)
    assert resumed.step == whole.step == 12
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters()))


def test_a_normalized_table_is_stored_as_it_is_used(dataset: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(make_job(dataset, tiny_variant("optimized")), KernelPlan())
    trainer.run_chunk(60)
    trainer.save(tmp_path / "c")
    ids = torch.from_numpy(dataset.windows("val", 2, CONTEXT - 1))
    with torch.no_grad():
        stored = load_model(tmp_path / "c")
        rms = stored.embedding.weight.square().mean(dim=-1).sqrt()
        # rms_norm adds 1.2e-7 to a mean square of 4e-4, the square of the table's first standard deviation.
        torch.testing.assert_close(rms, torch.ones_like(rms), atol=2e-4, rtol=0)
        # The same numbers on both sides, in another order of sums.
        torch.testing.assert_close(stored(ids), trainer.model.eval()(ids), atol=1e-4, rtol=0)


def test_resume_with_another_recipe_or_corpus_is_refused_with_the_difference(dataset: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(make_job(dataset, tiny_variant("optimized")), KernelPlan())
    trainer.run_chunk(60, 2)
    trainer.save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="seed was 0, now 1"):
        Trainer.resume(make_job(dataset, tiny_variant("optimized"), seed=1), KernelPlan(), tmp_path / "c")
    other = make_job(dataset, tiny_variant("optimized", learning_rate=0.5))
    with pytest.raises(CheckpointError, match=r"variant\.train\.learning_rate was 0\.003, now 0\.5"):
        Trainer.resume(other, KernelPlan(), tmp_path / "c")


def test_checkpoints_of_one_state_are_byte_identical(dataset: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(make_job(dataset, tiny_variant("baseline")), KernelPlan())
    trainer.run_chunk(60, 2)
    assert trainer.save(tmp_path / "a") == trainer.save(tmp_path / "b") == checkpoint_digest(tmp_path / "b")
    with pytest.raises(CheckpointError, match="exists already"):
        trainer.save(tmp_path / "a")


def test_the_optimized_losses_are_those_of_plain_torch(dataset: Dataset) -> None:
    """An independent Llama step, written with torch's own modules alone, from the same initial weights."""
    variant = tiny_variant("optimized", steps=4)
    trainer = Trainer(make_job(dataset, variant), KernelPlan(attention="explicit", loss_chunk=16, fused_optimizer=True))
    w = {n: nn.Parameter(p.detach().clone()) for n, p in trainer.model.named_parameters()}
    got = run(trainer)

    m, t, theta = variant.model.spec, variant.train, variant.model.rope_theta
    cos = torch.outer(torch.arange(CONTEXT), theta ** (-torch.arange(0, m.head_dim, 2) / m.head_dim))
    rotation = torch.polar(torch.ones_like(cos), cos)

    def rope(x: torch.Tensor) -> torch.Tensor:
        half = m.head_dim // 2
        turned = torch.view_as_real(torch.complex(x[..., :half], x[..., half:]) * rotation)
        return torch.cat((turned[..., 0], turned[..., 1]), dim=-1)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        table = w["embedding.weight"]
        table = table / table.square().mean(dim=-1, keepdim=True).sqrt()
        x = F.embedding(ids, table)
        for i in range(m.num_layers):
            p = f"layers.{i}."
            h = F.rms_norm(x, (m.dim,), w[p + "attn_norm.weight"], m.norm_eps)
            q, k, v = (h @ w[p + "attn.qkv.weight"].T).split((m.dim, m.kv_dim, m.kv_dim), -1)
            q, k, v = (y.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for y in (q, k, v))
            repeat = m.num_heads // m.num_kv_heads
            k, v = (y.repeat_interleave(repeat, dim=1) for y in (rope(k), v))
            a = F.scaled_dot_product_attention(rope(q), k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + a @ w[p + "attn.out.weight"].T
            h = F.rms_norm(x, (m.dim,), w[p + "ff_norm.weight"], m.norm_eps)
            gate, up = (h @ w[p + "gate_up.weight"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ w[p + "down.weight"].T
        return F.rms_norm(x, (m.dim,), w["final_norm.weight"], m.norm_eps) @ table.T

    rates = {n: t.embedding_learning_rate if n.startswith("embedding") else t.learning_rate for n in w}
    rates |= {n: t.learning_rate * t.output_rate for n in w if n.endswith(("attn.out.weight", "down.weight"))}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": rates[n], "peak": rates[n]} for n, p in w.items()],
        betas=(t.beta1, t.beta2),
        eps=t.epsilon,
        weight_decay=t.weight_decay,
    )
    batches = Batches(dataset, length=CONTEXT, batch_size=t.batch_size, seed=0)
    want = []
    for step in range(4):
        x, y = batches.batch(step)
        loss = F.cross_entropy(forward(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(list(w.values()), t.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule_factor(t, step, 4)
        optimizer.step()
        optimizer.zero_grad()
        want.append(loss.item())
    # Sums in another order, amplified by Adam where a gradient is near 0 (its step keeps only the sign): measured
    # below 2e-5 over four steps.
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_chunked_loss_has_the_gradients_of_the_whole_one() -> None:
    torch.manual_seed(0)
    h, W = torch.randn(50, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(0, 40, (50,))
    grads = []
    for chunk in (0, 16):
        loss = cross_entropy(h, W, targets, chunk) * 3
        grads.append((loss.detach(), *torch.autograd.grad(loss, (h, W))))
    for whole, chunked in zip(*grads):
        torch.testing.assert_close(whole, chunked, atol=1e-6, rtol=1e-5)


def test_chunked_loss_in_bf16_is_that_of_fp32_within_its_rounding() -> None:
    torch.manual_seed(0)
    h, W = torch.randn(512, 64, requires_grad=True), (torch.randn(300, 64) / 8).requires_grad_()
    targets = torch.randint(0, 300, (512,))
    exact = cross_entropy(h, W, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = cross_entropy(h, W, targets, 128)
    # Each probability is off by up to 2^-8 of itself, either way: the mean over 512 rows by far less.
    assert rounded.item() == pytest.approx(exact.item(), abs=2e-3)
    for want, got in zip(torch.autograd.grad(exact, (h, W)), torch.autograd.grad(rounded, (h, W))):
        assert F.cosine_similarity(want.flatten(), got.flatten(), dim=0) > 0.9999
        assert (want - got).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_unlikely_token_costs_as_much_in_half_precision(dtype: torch.dtype) -> None:
    h, W = torch.tensor([[20.0, 0.0]], requires_grad=True), torch.eye(2, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        assert cross_entropy(h, W, torch.tensor([1]), 8).item() == pytest.approx(20.0, abs=0.1)


def test_training_in_bf16_learns_what_fp32_does(dataset: Dataset) -> None:
    plans = (FP32, BF16)
    exact, rounded = (run(Trainer(make_job(dataset, tiny_variant("optimized")), plan)) for plan in plans)
    np.testing.assert_allclose(rounded, exact, atol=0.02)
    assert rounded != exact


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(dataset: Dataset) -> None:
    variants = [tiny_variant("baseline", gradient_accumulation_steps=n, steps=4) for n in (1, 4)]
    one, four = (Trainer(make_job(dataset, variant), KernelPlan()) for variant in variants)
    # Means of 4 equal parts summed in another order: a few ulp of a loss of order 6, then of each update.
    np.testing.assert_allclose(run(one), run(four), atol=1e-4)


def test_recomputed_activations_change_nothing(dataset: Dataset) -> None:
    kept, recomputed = (
        Trainer(make_job(dataset, tiny_variant("optimized", checkpoint_activations=c, steps=4)), KernelPlan())
        for c in (False, True)
    )
    assert run(kept) == run(recomputed)


def test_held_out_loss_is_the_mean_over_tokens_and_bytes(dataset: Dataset) -> None:
    trainer = Trainer(make_job(dataset, tiny_variant("baseline")), KernelPlan())
    got = evaluate(trainer.model, dataset, "val", 40)
    ids = torch.from_numpy(dataset.windows("val", 40, CONTEXT))
    with torch.no_grad():
        logp = trainer.model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
    text = b"".join(dataset.tokenizer.decode(row.tolist(), skip_special_tokens=False).encode() for row in ids[:, 1:])
    assert got.tokens == ids[:, 1:].numel()
    assert got.loss == pytest.approx(-logp.mean().item(), abs=1e-5)
    # Windows may begin or end inside a character, which decoding replaces: within 1 % of the exact bytes.
    assert got.bits_per_byte == pytest.approx(-logp.sum().item() / math.log(2) / len(text), rel=0.01)


def test_an_exploding_loss_stops_at_a_gate(dataset: Dataset) -> None:
    variant = tiny_variant("baseline", learning_rate=1e4, embedding_learning_rate=1e4, head_learning_rate=1e4)
    trainer = Trainer(make_job(dataset, variant), KernelPlan())
    with pytest.raises(TrainingError, match=r"gate (loss|grad_norm): .* at step \d+, expected"):
        run(trainer)
    assert trainer.step < trainer.num_steps


def test_not_a_number_in_the_weights_stops_at_a_gate(dataset: Dataset) -> None:
    trainer = Trainer(make_job(dataset, tiny_variant("optimized")), KernelPlan())
    with torch.no_grad():
        trainer.model.embedding.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="gate loss: loss is nan at step 0, expected a finite number"):
        trainer.run_chunk(60, 1)


def test_a_breach_says_what_it_was_across_processes() -> None:
    for loss, norm, gate in ((math.inf, 1.0, "loss"), (5.0, math.nan, "grad_norm"), (99.0, math.nan, "grad_norm")):
        with pytest.raises(GateBreach) as caught:
            check_step(7, loss, norm, first_loss=5.0, vocab_size=100)
        breach = pickle.loads(pickle.dumps(caught.value))
        assert (breach.gate, breach.step, str(breach)) == (gate, 7, str(caught.value))
    check_step(7, 5.0, 1.0, first_loss=5.0, vocab_size=100)


def test_memory_that_runs_out_is_one_line_with_what_to_do(dataset: Dataset) -> None:
    trainer = Trainer(make_job(dataset, tiny_variant("optimized")), KernelPlan())
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20), resource.RLIM_INFINITY))
    try:
        # The logits of this batch take 1.2 GB.
        trainer._batches = Batches(dataset, length=CONTEXT, batch_size=24_000, seed=0)
        with pytest.raises(RyotError, match=r"optimized/seed-0: out of memory in step 0") as caught:
            trainer._train_one()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "gradient_accumulation_steps" in str(caught.value.hint) and not isinstance(caught.value, TrainingError)


def test_an_overflow_in_half_precision_skips_a_step_and_the_scale_survives_a_resume(
    dataset: Dataset, tmp_path: Path
) -> None:
    job, plan = make_job(dataset, tiny_variant("optimized")), KernelPlan(dtype="fp16")
    trainer = Trainer(job, plan)
    trainer._take_step.scaler.load_state_dict({**trainer._take_step.scaler.state_dict(), "scale": 2.0**60})
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.run_chunk(60, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    trainer.save(tmp_path / "half")
    resumed = Trainer.resume(job, plan, tmp_path / "half")
    assert resumed._take_step.scaler.get_scale() == 2.0**59
    run(resumed)
    assert resumed.done


def test_training_learns_and_tells_what_it_did(dataset: Dataset) -> None:
    trainer = Trainer(make_job(dataset, tiny_variant("optimized", steps=60)), KernelPlan(fused_optimizer=True))
    events = trainer.run_chunk(120)
    val = [e for e in events if isinstance(e, EvalEvent) and e.split == "val"]
    test = [e for e in events if isinstance(e, EvalEvent) and e.split == "test"]
    assert val[0].step == 0 and val[0].loss == pytest.approx(math.log(VOCAB_SIZE), abs=0.5)
    assert val[-1].loss < val[0].loss - 0.5
    assert [e.step for e in test] == [60]
    steps = [e for e in events if isinstance(e, StepEvent)]
    assert steps[-1].step == 60 and steps[-1].tokens == 60 * 4 * CONTEXT
    assert all(e.tokens_per_s > 0 and e.grad_norm > 0 and e.rss_bytes > 0 for e in steps)


def test_every_sequence_is_seen_once_an_epoch(dataset: Dataset) -> None:
    batches = Batches(dataset, length=CONTEXT, batch_size=4, seed=3)
    steps = (dataset.num_tokens["train"] - 1) // CONTEXT // 4
    seen = torch.cat([batches.batch(i)[0][:, :] for i in range(steps)])
    tokens = torch.from_numpy(dataset.tokens("train").astype(np.int64))
    want = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    key = lambda rows: sorted(map(tuple, rows.tolist()))  # noqa: E731
    assert set(key(seen)) <= set(key(want)) and len(seen) == steps * 4
    assert not torch.equal(seen[:4], batches.batch(steps)[0])


def test_plans_are_checked(dataset: Dataset) -> None:
    from ryot.errors import ConfigError

    with pytest.raises(ConfigError, match=r"attention: got 'flash', expected explicit or sdpa"):
        replace(KernelPlan(), attention="flash")
