"""Sampling against the definition by full sorting, and that definition against transformers' own processors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ryot.edge.sampling import (
    HEAD,
    WIDE_HEAD,
    Sampler,
    choose_token,
    penalize_repetition,
    reference_choice,
)
from ryot.edge.sampling_params import SamplingParams
from ryot.errors import BundleError, ConfigError

GRID = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((0.3, 1.0, 2.5), (0, 1, 7, 128, 300), (1.0, 0.9, 0.2), (0.0, 0.02, 0.5))
]


def make_logits(kind: str, seed: int, size: int = 1000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "spread":
        return (3 * rng.standard_normal(size)).astype(np.float32)
    if kind == "flat":
        return (0.01 * rng.standard_normal(size)).astype(np.float32)
    # Half steps: many logits are equal, so every cut goes through a tie.
    return (rng.integers(-6, 6, size) / 2).astype(np.float32)


@pytest.mark.parametrize("kind", ["spread", "flat", "tied"])
@pytest.mark.parametrize("size", [5, HEAD, HEAD + 1, 1000, WIDE_HEAD + 1])
def test_the_fast_way_draws_exactly_what_sorting_everything_draws(kind: str, size: int) -> None:
    uniforms = [0.0, 0.25, 0.999, float(np.nextafter(1, 0)), *np.random.default_rng(1).random(4)]
    for seed, params in enumerate(GRID):
        logits = make_logits(kind, seed, size)
        for uniform in uniforms:
            assert choose_token(logits, params, uniform) == reference_choice(logits, params, uniform), params


@pytest.mark.parametrize("params", [p for p in GRID if p.temperature == 1.0], ids=str)
def test_the_definition_has_the_distribution_of_transformers(params: SamplingParams) -> None:
    import torch
    from transformers.generation import logits_process

    logits = make_logits("spread", 5, 300)
    seen = [3, 4, 5, 250]
    scores, ids = torch.tensor(logits)[None], torch.tensor([seen])
    scores = logits_process.RepetitionPenaltyLogitsProcessor(1.3)(ids, scores)
    if params.top_k:
        scores = logits_process.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = logits_process.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = logits_process.MinPLogitsWarper(params.min_p)(ids, scores)
    expected = scores.softmax(-1)[0].double().numpy()

    # Evenly spaced points through the whole distribution: token i is hit expected[i] * n times, up to one either end.
    n = 400
    penalized = penalize_repetition(logits, seen, 1.3)
    choices = [reference_choice(penalized, params, (i + 0.5) / n) for i in range(n)]
    hits = np.bincount(choices, minlength=logits.size)
    np.testing.assert_allclose(hits, expected * n, atol=1.01)
    assert set(np.flatnonzero(hits)) <= set(np.flatnonzero(expected))


def test_the_penalty_makes_seen_tokens_less_likely_on_both_sides_of_zero() -> None:
    logits = np.array([2.0, -2.0, 1.0, -1.0], np.float32)
    np.testing.assert_allclose(penalize_repetition(logits, [0, 1], 2.0), [1.0, -4.0, 1.0, -1.0])
    np.testing.assert_allclose(logits, [2.0, -2.0, 1.0, -1.0])


def test_a_penalized_greedy_choice_moves_to_another_token() -> None:
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), prompt_ids=[])
    assert [sampler.choose(logits) for _ in range(2)] == [0, 1]
    assert not sampler.params.greedy


def test_the_seed_and_the_row_decide_the_draws() -> None:
    logits = make_logits("flat", 0)

    def draws(seed: int, row: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [], row=row)
        return [sampler.choose(logits) for _ in range(8)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(seed, row)) for seed in (1, 2) for row in (0, 1)}) == 4


def test_a_low_temperature_takes_the_best_token_without_overflow() -> None:
    logits = make_logits("spread", 3)
    params = SamplingParams(temperature=1e-4)
    assert {choose_token(logits, params, u) for u in (0.0, 0.5, 0.999)} == {int(logits.argmax())}


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(BundleError, match="NaN"):
        Sampler(SamplingParams(temperature=1.0), []).choose(np.array([1.0, np.nan], np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2.0), ("repetition_penalty", 0.0)],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field}: got {value}"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-46),
        SamplingParams(temperature=5e-324),
        SamplingParams(temperature=1.0, repetition_penalty=1e-46),
        SamplingParams(temperature=1.0, repetition_penalty=1e-300, top_k=2),
    ],
)
def test_settings_too_small_for_float32_draw_the_best_token(params: SamplingParams) -> None:
    # A penalty below 1 makes tokens that were seen likelier: here without bound. Where a step fails all rows do.
    logits_V = np.array([1, -2, 3, 2.5], np.float32)
    for row in range(8):
        assert Sampler(params, [2], row=row).choose(logits_V) == 2
