"""Calibration: moments are those of the inputs, and what an error is expected to cost is what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ryot.deploy.calibration import capture_moments, measure_sensitivity
from ryot.deploy.weights import load_decoder_weights
from ryot.models.sources.folder import open_folder
from ryot.train.checkpoint import build_decoder

from .conftest import CONTEXT

#: Errors are taken as independent from output to output and from token to token. Attention mixes tokens, and a small
#: random decoder sees much the same inputs at all of them, so that theirs add up: 3 times was seen.
WITHIN = 5


@pytest.fixture(scope="module")
def weights(checkpoint):
    return load_decoder_weights(open_folder(checkpoint))


@pytest.fixture(scope="module")
def windows(data):
    return data.windows("train", 24, CONTEXT)[:, :-1]


@pytest.fixture(scope="module")
def sensitivity(weights, windows):
    return measure_sensitivity(weights, windows)


def moments_of(weights, windows, token_weights=None):
    """Input moments over all of the windows alike, and over the same ones weighed."""
    found = {}
    if token_weights is None:
        token_weights = dict.fromkeys((*weights.linears, weights.head), torch.ones(windows.size))
    capture_moments(weights, windows, windows, token_weights, lambda name, both: found.update({name: both}))
    return {name: both.cost_KK for name, both in found.items()}


@pytest.fixture(scope="module")
def moments(weights, windows):
    return moments_of(weights, windows)


def test_the_torch_decoder_reads_the_arrays_themselves(weights):
    model = build_decoder(weights.spec, weights.arrays)
    table = model.get_parameter("embedding.weight")
    assert table.data_ptr() == weights["embedding.weight"].ctypes.data
    assert not table.requires_grad


def test_moments_are_handed_over_in_order_and_are_those_of_the_inputs(weights, windows, moments):
    assert list(moments) == list(dict.fromkeys((*weights.linears, weights.head)))
    # The whole chain by other means: a matrix's inputs from the gradient of its own weight, which is dy^T x.
    model, name = build_decoder(weights.spec, weights.arrays), "layers.1.down"
    weight = model.get_submodule(name).weight.requires_grad_()
    total = torch.zeros(weight.shape[1], weight.shape[1])
    for window in windows[:2]:
        for position in range(CONTEXT):
            y = {}
            handle = model.get_submodule(name).register_forward_hook(lambda module, x, out, y=y: y.update(out=out))
            model(torch.from_numpy(window[None, : position + 1]))
            handle.remove()
            [x_of_row] = torch.autograd.grad(y["out"][0, -1, 0], weight)
            total += torch.outer(x_of_row[0], x_of_row[0])
    found = moments_of(weights, windows[:2])
    np.testing.assert_allclose(found[name], total / (2 * CONTEXT), rtol=1e-3, atol=1e-6)


def test_tokens_weigh_one_on_average_and_moments_are_weighed_by_them(weights, windows, sensitivity, moments):
    for token_weights in sensitivity.tokens.values():
        assert token_weights.shape == (windows.size,)
        assert token_weights.mean().item() == pytest.approx(1, rel=1e-4)
        assert token_weights.min() >= 0.5
    name, only = "layers.1.down", 5
    one = {n: torch.zeros(windows.size) for n in moments} | {name: torch.eye(windows.size)[only] * windows.size}
    found = moments_of(weights, windows, one)
    # All weight on one token: a matrix of rank 1, and the sum over all tokens gives the moments back.
    assert torch.linalg.matrix_rank(found[name]) == 1
    assert not found["layers.0.attn.qkv"].any()
    assert found[name].diagonal().sum() <= windows.size * moments[name].diagonal().sum()


@torch.no_grad()
def measured_kl(weights, windows, name, change):
    ids = torch.from_numpy(windows)
    expected = F.log_softmax(build_decoder(weights.spec, weights.arrays)(ids).double(), -1)
    model = build_decoder(weights.spec, weights.arrays)
    module, _, parameter = f"{name}.weight".rpartition(".")
    setattr(
        model.get_submodule(module),
        parameter,
        torch.nn.Parameter(torch.from_numpy(weights[f"{name}.weight"]) + change, requires_grad=False),
    )
    found = F.log_softmax(model(ids).double(), -1)
    return F.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean().item()


@pytest.mark.parametrize("kind", ["attn.qkv", "attn.out", "down"])
def test_the_expected_kl_of_an_error_is_near_what_it_costs(weights, windows, sensitivity, moments, kind):
    name = f"layers.0.{kind}"
    values = torch.from_numpy(weights[f"{name}.weight"])
    change = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)) * values.std() * 0.05
    errors = ((change @ moments[name]) * change).sum(dim=1)
    expected = sensitivity.product_cost(name, errors)
    assert expected / WITHIN < measured_kl(weights, windows, name, change) < WITHIN * expected


def test_the_table_costs_about_what_its_lookups_and_its_products_cost(weights, windows, sensitivity, moments):
    table = torch.from_numpy(weights["embedding.weight"])
    change = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) * table.std() * 0.05
    expected = sensitivity.lookup_cost(change)
    if weights.head == "embedding":
        expected += sensitivity.product_cost("embedding", ((change @ moments["embedding"]) * change).sum(dim=1))
    assert expected / WITHIN < measured_kl(weights, windows, "embedding", change) < WITHIN * expected
