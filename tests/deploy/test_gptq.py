"""Rounding by GPTQ and by searched scales: what the outputs lose, against plain rounding and against the textbook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ryot.deploy.gptq import damping, factorize, output_errors, round_by_gptq, round_by_search
from ryot.deploy.matrices import quantize_blocks

N, K = 48, 256
TOKENS = 100 * K


@pytest.fixture(scope="module")
def problem():
    """Weights, and inputs as a network has them: correlated, and a few much larger than the rest."""
    r = np.random.default_rng(0)
    weights = r.standard_normal((N, K)).astype(np.float32)
    x = r.standard_normal((4096, 32)) @ r.standard_normal((32, K)) + 0.3 * r.standard_normal((4096, K))
    x = (x * np.exp(r.standard_normal(K))).astype(np.float32)
    return weights, x, torch.from_numpy(x.T @ x / len(x))


def lost(problem, matrix):
    weights, x, _ = problem
    return np.square(x.astype(np.float64) @ (matrix.dequantize() - weights).T).mean()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_gptq_loses_least_then_searched_scales_then_rtn(problem, size):
    weights, _, moments = problem
    rtn = lost(problem, quantize_blocks(weights, bits=4, block_size=size))
    search = lost(problem, round_by_search(weights, moments.diagonal(), bits=4, block_size=size))
    gptq = lost(problem, round_by_gptq(weights, factorize(moments, TOKENS), bits=4, block_size=size))
    assert search < rtn
    assert gptq < 0.5 * rtn
    assert gptq < 0.8 * search


def test_zero_points_lose_less_than_symmetric_blocks(problem):
    weights, x, moments = problem
    one_sided, curvature = weights + 1.0, factorize(moments, TOKENS)
    found = [
        lost((one_sided, x, moments), round_by_gptq(one_sided, curvature, bits=4, block_size=32, asymmetric=asymmetric))
        for asymmetric in (True, False)
    ]
    assert found[0] < 0.7 * found[1]


def test_eight_bits_gain_by_gptq_too(problem):
    weights, _, moments = problem
    rtn = lost(problem, quantize_blocks(weights, bits=8, block_size=32))
    gptq = round_by_gptq(weights, factorize(moments, TOKENS), bits=8, block_size=32, asymmetric=False)
    assert lost(problem, gptq) < 0.5 * rtn


def test_few_tokens_of_calibration_do_no_harm_on_others():
    """Half as many tokens as inputs: with the usual damping GPTQ fits them so well that other text loses by it."""
    r = np.random.default_rng(0)
    weights = r.standard_normal((N, K)).astype(np.float32)
    mixing = r.standard_normal((K, K)) * np.exp(0.5 * r.standard_normal(K))
    few, many = ((r.standard_normal((count, K)) @ mixing).astype(np.float32) for count in (K // 2, 4096))
    moments = torch.from_numpy(few.T @ few / len(few))

    def lost_elsewhere(matrix):
        return np.square(many @ (matrix.dequantize() - weights).T).mean()

    search = lost_elsewhere(round_by_search(weights, moments.diagonal(), bits=4, block_size=32))
    careful = round_by_gptq(weights, factorize(moments, len(few)), bits=4, block_size=32)
    careless = round_by_gptq(weights, factorize(moments, 100 * K), bits=4, block_size=32)
    assert lost_elsewhere(careful) < search < lost_elsewhere(careless)


def textbook_gptq(weights, moments, scales, zeros, size):
    """GPTQ column by column in float64, with the whole inverse updated by elimination instead of a factor of it."""
    order = np.argsort(-np.diag(moments), kind="stable")
    h = moments[np.ix_(order, order)].astype(np.float64)
    inverse = np.linalg.inv(h + np.eye(len(h)) * damping(K, TOKENS) * np.diag(h).mean())
    left, codes = weights[:, order].astype(np.float64), np.zeros(weights.shape, np.int64)
    for i, column in enumerate(order):
        scale, zero = scales[:, column // size].astype(np.float64), zeros[:, column // size].astype(np.float64)
        codes[:, column] = np.clip(np.rint(left[:, i] / scale) + zero, 0, 15)
        error = (left[:, i] - (codes[:, column] - zero) * scale) / inverse[i, i]
        left -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("rows", [N, 20])
def test_panels_give_the_codes_of_the_textbook(problem, rows, monkeypatch):
    monkeypatch.setattr("ryot.deploy.gptq.ROWS_AT_ONCE", rows)
    weights, _, moments = problem
    threads = torch.get_num_threads()
    found = round_by_gptq(weights, factorize(moments, TOKENS), bits=4, block_size=64)
    expected = textbook_gptq(weights, moments.numpy(), found.scales_NC, found.zeros_NC, 64)
    # float32 against float64: a value within 1e-5 of the middle between two codes may go either way, and what follows
    # it in its row then differs by a step.
    assert (found.codes_NCE.reshape(N, K) == expected).mean() > 0.99
    assert torch.get_num_threads() == threads


def test_the_error_of_outputs_is_that_of_running_them(problem):
    weights, x, moments = problem
    matrix = quantize_blocks(weights, bits=4, block_size=32)
    expected = np.square(x.astype(np.float64) @ (matrix.dequantize() - weights).T).mean(axis=0)
    np.testing.assert_allclose(output_errors(weights, matrix, moments).numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_a_width_without_a_block_size_is_padded_with_zeros_and_inputs_that_are_never_used_do_no_harm(bits, asymmetric):
    r = np.random.default_rng(0)
    weights, x = r.standard_normal((8, 100)).astype(np.float32), r.standard_normal((500, 100)).astype(np.float32)
    x[:, 3] = 0
    moments = torch.from_numpy(x.T @ x / len(x))
    for matrix in (
        round_by_gptq(weights, factorize(moments, TOKENS), bits=bits, block_size=32, asymmetric=asymmetric),
        round_by_search(weights, bits=bits, block_size=32, asymmetric=asymmetric),
    ):
        assert matrix.codes_NCE.shape == (8, 4, 32)
        zeros = matrix.zeros_NC if asymmetric else np.full((8, 4), 1 << (bits - 1))
        assert (matrix.codes_NCE[:, 3, 4:] == zeros[:, 3, None]).all()
        assert np.square(matrix.dequantize() - weights).mean() < 0.02 * np.square(weights).mean()


def test_zeros_stay_zero():
    zeros = np.zeros((4, 64), np.float32)
    assert not round_by_search(zeros, bits=4, block_size=32).dequantize().any()
    assert not round_by_gptq(zeros, factorize(torch.eye(64), TOKENS), bits=4, block_size=32).dequantize().any()
