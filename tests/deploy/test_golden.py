"""Golden prompts: which errors of a logit may change a token."""

from __future__ import annotations

import numpy as np
import pytest

from ryot.deploy.golden import NUM_RIVALS, _distance_error


def test_only_errors_that_could_change_a_token_count():
    exact_TV = np.random.default_rng(0).permuted(np.tile(np.arange(100, dtype=np.float32), (5, 1)), axis=1)
    shifted = exact_TV + np.arange(5, dtype=np.float32)[:, None]
    assert _distance_error(shifted, exact_TV) == pytest.approx(0, abs=1e-5)
    far_below = np.where(exact_TV < 100 - NUM_RIVALS, exact_TV - 7, exact_TV)
    assert _distance_error(far_below, exact_TV) == 0
    second = np.where(exact_TV == 98, exact_TV + np.float32(0.75), exact_TV)
    assert _distance_error(second, exact_TV) == 0.75


def test_a_token_that_only_exact_arithmetic_finds_likely_counts():
    exact_TV = np.tile(np.arange(100, dtype=np.float32), (5, 1))
    found_TV = exact_TV.copy()
    found_TV[:, 99] = 50  # another machine may well choose it
    assert _distance_error(found_TV, exact_TV) == 49
