"""Matrices that a GGUF holds in blocks: read as gguf's own dequantizer reads them, repacked without rounding or not."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from ryot.deploy.quantize import Quantizer
from ryot.deploy.settings import ExportSettings
from ryot.deploy.stored import StoredBlocks, repack, repack_with_offsets, take_blocks
from ryot.deploy.weights import DecoderWeights
from ryot.models.sources.gguf_reader import split_blocks

from .conftest import CONFIGS, random_decoder
from .test_matrices import run_product


def stored_blocks(rows, kind):
    return take_blocks(split_blocks(rows, gguf.GGMLQuantizationType[kind]))


def quantized(kind, width=128):
    values = np.random.default_rng(0).standard_normal((24, width)).astype(np.float32)
    values[3, 32:64] = 0
    tensor_type = gguf.GGMLQuantizationType[kind]
    rows = quantize(values, tensor_type)
    return rows, dequantize(rows, tensor_type)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_hold_what_ggufs_own_dequantizer_gives(kind):
    rows, expected = quantized(kind)
    # One rounding of float32: gguf subtracts the zero before it multiplies.
    np.testing.assert_allclose(stored_blocks(rows, kind).dequantize(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_symmetric_types_are_repacked_to_the_last_bit(kind, bits):
    rows, expected = quantized(kind)
    matrix = repack(stored_blocks(rows, kind))
    assert (matrix.bits, matrix.block_size, matrix.zeros_NC) == (bits, 32, None)
    assert (matrix.dequantize() == expected).all()


def test_a_float_minimum_is_not_repacked():
    rows, _ = quantized("Q4_1")
    assert repack(stored_blocks(rows, "Q4_1")) is None


def test_whole_zero_codes_are_kept_and_those_outside_the_codes_refused():
    codes = np.random.default_rng(0).integers(0, 16, (2, 2, 32), dtype=np.uint8)
    scales = np.array([[0.5, 0.1], [0.3, 0.7]], np.float32)
    zeros = np.array([[3, 0], [15, 8]])
    stored = StoredBlocks(codes, scales, (-zeros * scales).astype(np.float32))
    matrix = repack(stored)
    assert (matrix.zeros_NC == zeros).all()
    np.testing.assert_allclose(matrix.dequantize(), stored.dequantize(), rtol=1e-5, atol=1e-6)
    assert repack(StoredBlocks(codes, scales, scales * -16)) is None


@pytest.mark.parametrize("width", [128, 1536])  # 4 blocks, and 48, which a block of 16 would divide
def test_a_float_minimum_becomes_columns_that_multiply_sums_of_inputs(width, tmp_path):
    rows, expected = quantized("Q4_1", width)
    matrix = repack_with_offsets(stored_blocks(rows, "Q4_1"))
    energy = np.square(expected).mean()
    # What is left of a minimum is at most half a step, and is kept to a fifteenth of that.
    assert np.square(matrix.dequantize() - expected).mean() < 1e-4 * energy
    assert np.square(matrix.blocks.dequantize() - expected).mean() > 1e-3 * energy
    assert matrix.num_bytes < 1.3 * matrix.blocks.num_bytes
    x = np.random.default_rng(1).standard_normal((1, 3, width)).astype(np.float32)
    found = run_product(tmp_path, matrix, x)
    exact = x.astype(np.float64) @ expected.T
    # Inputs are rounded to int8: some 0.6 % of the outputs.
    assert np.sqrt(np.square(found - exact).mean() / np.square(exact).mean()) < 0.01


class GgufLike:
    """A decoder whose matrices are held as a GGUF file would hold them."""

    def __init__(self, cfg, layers, table):
        self.rows, arrays = {}, {name: t.numpy() for name, t in random_decoder(cfg).state_dict().items()}
        for name, values in arrays.items():
            if values.ndim == 2:
                kind = table if name == "embedding.weight" else layers
                tensor_type = gguf.GGMLQuantizationType[kind]
                self.rows[name.removesuffix(".weight")] = (quantize(values, tensor_type), kind)
                arrays[name] = dequantize(self.rows[name.removesuffix(".weight")][0], tensor_type)
        self.weights = DecoderWeights(spec=cfg, arrays=arrays)

    def blocks(self, name):
        return stored_blocks(*self.rows[name])


@pytest.mark.parametrize(("layers", "kept"), [("Q4_1", True), ("Q4_0", True), ("Q8_0", False)])
def test_int4_of_a_source_in_four_bits_is_not_rounded_again(layers, kept, data, tmp_path):
    source = GgufLike(CONFIGS["llama"], layers, "Q8_0")
    quantizer = Quantizer(source.weights, data, ExportSettings(), 1.01, tmp_path, source=source)
    found = quantizer.quantize("int4")
    assert (set(found.record["formats"].values()) == {"as stored"}) == kept
    assert list(found.matrices) == ["embedding", *source.weights.linears]
    error = {
        name: np.square(matrix.dequantize() - source.weights[f"{name}.weight"]).mean()
        / np.square(source.weights[f"{name}.weight"]).mean()
        for name, matrix in found.matrices.items()
    }
    assert (max(error.values()) < 1e-4) == kept
