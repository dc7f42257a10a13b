"""What 8 bits are expected to cost, against the errors that rounding really leaves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ryot.deploy.calibration import measure_sensitivity
from ryot.deploy.eight_bits import dynamic_cost, eight_bit_formats, measure_inputs
from ryot.deploy.matrices import quantize_blocks, quantize_dynamic
from ryot.deploy.selection import Format, Ladder
from ryot.deploy.weights import DecoderWeights
from ryot.models.blocks import split_blocks
from ryot.train.checkpoint import build_decoder

from .conftest import CONFIGS, CONTEXT, random_decoder

SIZES = [16, 32]


def rounded(x_TK, size):
    """As the runtime rounds inputs: each block of a token to 127 steps of its largest value."""
    blocks = split_blocks(x_TK, size)
    steps = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.rint(blocks / steps) * steps).reshape(len(x_TK), -1)[:, : x_TK.shape[1]]


@pytest.fixture(scope="module")
def weights():
    spec = dataclasses.replace(CONFIGS["llama"], tie_embeddings=False)
    arrays = {name: t.numpy() for name, t in random_decoder(spec).state_dict().items()}
    return DecoderWeights(spec=spec, arrays=arrays)


def test_the_expected_cost_is_that_of_the_errors_of_inputs_and_weights(weights, data):
    windows = data.windows("train", 16, CONTEXT)[:, :-1]
    sensitivity = measure_sensitivity(weights, windows)
    inputs = measure_inputs(weights, windows, sensitivity)
    model, seen = build_decoder(weights.spec, weights.arrays), {}
    names = ["layers.0.attn.qkv", "layers.1.gate_up", "layers.1.down"]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].flatten(0, -2).numpy()})
        )
    with torch.no_grad():
        model(torch.from_numpy(windows))
    assert seen.keys() == set(names)
    for name in names:
        values, x_TK = weights[f"{name}.weight"], seen[name]
        formats = eight_bit_formats(name, values, SIZES, sensitivity, inputs[name])
        for size, found in zip(SIZES, formats):
            matrix = quantize_blocks(values, bits=8, block_size=size)
            error_TN = rounded(x_TK, size) @ matrix.dequantize().T - x_TK @ values.T
            by_output_N = (sensitivity.tokens[name].numpy()[:, None] * error_TN**2).mean(axis=0)
            # Thousands of errors, each of a size that is known to a few percent, and the largest inputs have none.
            assert found.expected_kl == pytest.approx(0.5 * by_output_N @ sensitivity.outputs[name].numpy(), rel=0.2)
            assert (found.label, found.price) == (f"8 bits/{size}", matrix.num_bytes)
        assert formats[0].expected_kl < formats[1].expected_kl
        for bits in (8, 7):
            dynamic = quantize_dynamic(values, bits=bits)
            found_NK = dynamic.codes_NK * dynamic.scales_N[:, None]
            error_TN = rounded(x_TK, values.shape[1]) @ found_NK.T - x_TK @ values.T
            by_output_N = (sensitivity.tokens[name].numpy()[:, None] * error_TN**2).mean(axis=0)
            outputs_N = sensitivity.outputs[name]
            expected = dynamic_cost(values, bits, outputs_N, inputs[name])
            assert expected == pytest.approx(0.5 * by_output_N @ outputs_N.numpy(), rel=0.25)


def test_a_table_that_is_only_looked_up_costs_what_its_rows_lose(weights, data):
    sensitivity = measure_sensitivity(weights, data.windows("train", 16, CONTEXT)[:, :-1])
    values = weights["embedding.weight"]
    for size, found in zip(SIZES, eight_bit_formats("embedding", values, SIZES, sensitivity, None)):
        errors = quantize_blocks(values, bits=8, block_size=size).dequantize() - values
        assert found.expected_kl == pytest.approx(sensitivity.lookup_cost(torch.from_numpy(errors)), rel=0.2)


def test_an_upgrade_that_saves_little_for_its_bytes_is_not_taken():
    ladder = Ladder(
        {
            "much": [
                Format(label="b", price=100, expected_kl=0.5),
                Format(label="a", price=110, expected_kl=0.1),
            ],
            "little": [
                Format(label="b", price=100, expected_kl=0.5),
                Format(label="a", price=110, expected_kl=0.4),
            ],
        }
    )
    # 40 % of the KL for 5 % of the bytes, then 17 % for 4.8 %.
    assert [ladder.rung_that_pays(times) for times in (9, 7, 4, 3)] == [0, 1, 1, 2]
