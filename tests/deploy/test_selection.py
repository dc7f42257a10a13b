"""The ladder of mixes: what is upgraded first, and how few measurements find the smallest mix within a limit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ryot.deploy.matrices import quantize_blocks
from ryot.deploy.selection import CLOSE_ENOUGH, CLOSE_PRICE, MAX_MEASURED, Ladder, Option, find_cheapest

MATRIX = quantize_blocks(np.ones((1, 32), np.float32), bits=4, block_size=32)


def option(price, expected_kl, bits=4):
    return Option(label=f"{bits} bits", price=price, expected_kl=expected_kl, matrix=MATRIX)


def random_ladder(seed=0, matrices=60):
    """Matrices of several sizes whose costs spread over two orders of magnitude, as a real model's do."""
    r = np.random.default_rng(seed)
    options = {}
    for i in range(matrices):
        size, cost = int(r.choice([1000, 3000, 9000])), float(np.exp(r.normal(-9, 1.2)))
        options[f"m{i}"] = [option(size, cost), option(int(size * 1.15), cost * 0.7), option(size * 2, cost * 0.02, 8)]
    return Ladder(options)


def test_each_rung_adds_bytes_and_saves_kl_and_the_first_ones_save_most():
    ladder = random_ladder()
    rungs = range(ladder.top + 1)
    for rung in rungs:
        mix = ladder.mix(rung).values()
        assert sum(o.price for o in mix) == ladder.price(rung)
        assert sum(o.expected_kl for o in mix) == pytest.approx(ladder.expected_kl(rung))
    gains = [
        (ladder.expected_kl(a) - ladder.expected_kl(b)) / (ladder.price(b) - ladder.price(a))
        for a, b in itertools.pairwise(rungs)
    ]
    assert gains == sorted(gains, reverse=True)
    assert {o.label for o in ladder.mix(ladder.top).values()} == {"8 bits"}


def test_no_choice_of_two_matrices_beats_a_rung_of_equal_bytes():
    options = {
        "a": [option(10, 5.0), option(12, 3.0), option(20, 0.5)],
        "b": [option(10, 1.0), option(12, 0.9), option(20, 0.1)],
    }
    ladder = Ladder(options)
    every = [(x.price + y.price, x.expected_kl + y.expected_kl) for x in options["a"] for y in options["b"]]
    for rung in range(ladder.top + 1):
        best = min(kl for price, kl in every if price <= ladder.price(rung))
        assert ladder.expected_kl(rung) == pytest.approx(best)


def test_an_option_that_is_larger_and_no_better_is_never_taken():
    ladder = Ladder({"a": [option(10, 5.0), option(15, 5.0), option(20, 1.0)]})
    assert [ladder.mix(rung)["a"].price for rung in range(ladder.top + 1)] == [10, 20]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [0.3, 0.1, 0.02])
def test_the_smallest_mix_within_the_limit_is_found_with_few_measurements(seed, limit):
    ladder = random_ladder(seed)
    # What graphs cost beyond expectation: a factor and a constant, and some unevenness.
    wiggle = np.random.default_rng(seed).normal(1, 0.02, ladder.top + 1)
    scale = 1 / ladder.expected_kl(0)
    measured = []

    def measure(rung):
        measured.append(rung)
        return float((0.6 * scale * ladder.expected_kl(rung) + 0.005) * wiggle[rung])

    rung = find_cheapest(ladder, measure, limit)
    measured_by = list(measured)
    assert len(measured_by) <= MAX_MEASURED
    assert measure(rung) <= limit
    cheaper = [r for r in range(rung) if ladder.price(r) < (1 - CLOSE_PRICE) * ladder.price(rung)]
    assert all(measure(r) > CLOSE_ENOUGH * 0.9 * limit for r in cheaper)


def test_the_smallest_of_all_needs_one_measurement_and_a_hopeless_case_ends_at_the_best():
    ladder, seen = random_ladder(), []
    assert find_cheapest(ladder, lambda rung: seen.append(rung) or 0.0, 0.1) == 0
    assert seen == [0]
    seen.clear()
    assert find_cheapest(ladder, lambda rung: seen.append(rung) or 9.0, 0.1) == ladder.top
    assert len(seen) <= MAX_MEASURED
