"""The loss against the formulas of the papers, written out, and pass@k against counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ryot.mapping import read_mapping, to_mapping
from ryot.reinforce.gates import MAX_EQUAL_STEPS, RewardGates, StepFigures
from ryot.reinforce.grpo import Weights, group_advantages, policy_loss
from ryot.reinforce.pass_at_k import estimate_pass_at_k, pass_at_k
from ryot.train.gates import GateBreach

PLAIN = Weights(clip_low=0.2, clip_high=0.28, kl=0.0, importance_limit=2.0)


def tokens(count: int = 40, spread: float = 0.3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    old = -torch.rand(count, generator=generator) * 3
    new = old + torch.randn(count, generator=generator) * spread
    sampled = old + torch.randn(count, generator=generator) * spread
    advantages = torch.randn(count, generator=generator)
    return new.requires_grad_(), old, sampled, advantages


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    new, _, _, advantages = tokens()
    on_policy = new.detach().clone().requires_grad_()
    loss = policy_loss(on_policy, on_policy.detach(), on_policy.detach(), advantages, PLAIN).loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert on_policy.grad is not None
    # d/dlogp of -mean(A logp)
    torch.testing.assert_close(on_policy.grad, -advantages / len(advantages))


@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_the_loss_is_the_papers_token_by_token(kl: float) -> None:
    new, old, sampled, advantages = tokens()
    reference = old + 0.1
    weights = PLAIN._replace(kl=kl)
    found = policy_loss(new, old, sampled, advantages, weights, reference)
    expected, clipped = 0.0, 0
    for n, o, s, a, r in zip(*(x.detach().tolist() for x in (new, old, sampled, advantages, reference)), strict=True):
        ratio = math.exp(n - o)
        low_high = min(max(ratio, 1 - 0.2), 1 + 0.28)
        clipped += ratio != low_high
        expected -= min(math.exp(o - s), 2.0) * min(ratio * a, low_high * a)
        expected += kl * (math.exp(r - n) - (r - n) - 1)
    assert found.loss.item() == pytest.approx(expected / len(old), rel=1e-5)
    assert found.clipped == pytest.approx(clipped / len(old), abs=0.03)
    assert 0 < clipped < len(old)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    new, old, sampled, advantages = tokens()
    whole = policy_loss(new, old, sampled, advantages, PLAIN).loss
    parts = [
        policy_loss(new[part], old[part], sampled[part], advantages[part], PLAIN, count=len(old)).loss
        for part in (slice(0, 7), slice(7, 40))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_advantages_are_relative_to_the_group() -> None:
    found = group_advantages([[1, 0, 0, 1], [1, 1], [0.2, 0.4]], divide_by_std=False)
    assert found == [[0.5, -0.5, -0.5, 0.5], [0, 0], [pytest.approx(-0.1), pytest.approx(0.1)]]
    (scaled, equal) = group_advantages([[3, 1, 2], [1, 1]], divide_by_std=True)
    assert np.mean(scaled) == pytest.approx(0) and np.std(scaled) == pytest.approx(1, abs=1e-5)
    assert equal == [0, 0]


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_equal_rewards_that_are_no_binary_fractions_have_no_advantage(divide_by_std: bool) -> None:
    # The mean of three times 0.1 is not 0.1 in float64.
    for reward, count in itertools.product((0.1, 0.3, 0.7), range(2, 17)):
        assert group_advantages([[reward] * count], divide_by_std=divide_by_std) == [[0.0] * count]


@pytest.mark.parametrize(("passed", "samples"), [(0, 5), (1, 5), (3, 5), (5, 5), (2, 8)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass(passed: int, samples: int) -> None:
    answers = [True] * passed + [False] * (samples - passed)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(passed, samples, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_an_interval_over_prompts_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        chances = rng.beta(1, 1, 100)  # of each prompt; their mean is 0.5
        found = estimate_pass_at_k(rng.binomial(8, chances).tolist(), 8, 1)
        inside += found.low <= 0.5 <= found.high
    # 95 % of 200 is 190, with a standard deviation of 3.1.
    assert inside >= 180


def figures(**changes: float) -> StepFigures:
    return StepFigures(**({"reward": 0.5, "entropy": 1.0, "length": 10, "cut": 0.1, "differing": 3} | changes))


@pytest.mark.parametrize(
    ("gate", "changes"),
    [
        ("reward", {"reward": 0.05}),
        ("entropy", {"entropy": 0.001}),
        ("length", {"length": 40, "cut": 0.9}),
        ("equal_rewards", {"differing": 0}),
    ],
)
def test_what_teaches_nothing_any_more_is_stopped(gate: str, changes: dict[str, float]) -> None:
    gates = RewardGates()
    for step in range(20):
        gates.check(step, figures())
    gates = read_mapping(RewardGates, to_mapping(gates))
    with pytest.raises(GateBreach) as caught:
        for step in range(20, 60):
            gates.check(step, figures(**changes))
    assert caught.value.gate == gate


def test_a_task_that_is_solved_is_no_breach() -> None:
    gates = RewardGates()
    for step in range(100):
        gates.check(step, figures(reward=1.0, differing=0, entropy=1.0 if step < 20 else 1e-6))
    assert (gates.equal_steps, gates.first_entropy) == (0, 1.0)


def test_rewards_that_are_all_equal_from_the_start_are_a_breach() -> None:
    gates = RewardGates()
    with pytest.raises(GateBreach, match="all rewards of every prompt were equal") as caught:
        for step in range(100):
            gates.check(step, figures(reward=0.0, differing=0))
    assert caught.value.step == MAX_EQUAL_STEPS
