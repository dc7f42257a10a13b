"""How often a model's answers pass: pass@k over held-out prompts, with an interval over the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

#: Draws of the bootstrap over prompts, and the share of them inside the interval.
RESAMPLES, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True, slots=True)
class PassAtK:
    """The probability that at least one of k answers passes, with its interval."""

    k: int
    value: float
    low: float
    high: float


def pass_at_k(num_passed: int, num_samples: int, k: int) -> float:
    """Unbiased estimate of one prompt's pass@k from `num_samples` answers (Chen et al. 2021)."""
    assert 0 <= num_passed <= num_samples and 1 <= k <= num_samples
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)


def estimate_pass_at_k(passed: Sequence[int], num_samples: int, k: int) -> PassAtK:
    """Mean over prompts, of which `passed` says how many of `num_samples` answers passed; bootstrap over prompts."""
    values = np.array([pass_at_k(count, num_samples, k) for count in passed])
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return PassAtK(k, float(values.mean()), float(low), float(high))
