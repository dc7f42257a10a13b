"""Weight formats: what is stored is what the runtime multiplies with, on this CPU."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from ryot.deploy import blocks
from ryot.deploy.datafile import LARGE_BYTES, PAGE_BYTES, DataFile
from ryot.deploy.matrices import (
    BlockMatrix,
    FloatMatrix,
    block_size_for,
    quantize_blocks,
    quantize_dynamic,
)
from ryot.deploy.settings import BLOCK_SIZES
from ryot.edge.machine import describe_cpu, sums_int8_exactly

N, K = 48, 256


def run_product(folder, matrix, x):
    with DataFile(folder / "data") as data:
        g = blocks.GraphBuilder("product", data)
        g.input("x", TensorProto.FLOAT, ["B", "S", x.shape[-1]])
        g.output(blocks.linear(g, "x", "w", matrix), TensorProto.FLOAT, ["B", "S", len(matrix.dequantize())])
        model = g.model()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return ort.InferenceSession(folder / "model.onnx").run(None, {"x": x})[0]


def worst_case():
    """Weights and inputs at the ends of their ranges, with the signs that add up most."""
    signs = np.sign(np.random.default_rng(0).standard_normal((N, K))).astype(np.float32)
    cases = [(np.ones((N, K), np.float32), np.ones((1, 5, K), np.float32))]
    cases.append((signs, np.tile(signs[:5], (1, 1, 1))))
    return cases


FORMATS = {
    "dynamic-7": lambda w: quantize_dynamic(w, bits=7),
    **{
        f"{bits} bits, blocks of {size}": lambda w, b=bits, s=size: quantize_blocks(w, bits=b, block_size=s)
        for bits in (4, 8)
        for size in BLOCK_SIZES
    },
}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_products_do_not_saturate(name, rows, tmp_path):
    for weights, x in worst_case():
        matrix = FORMATS[name](weights)
        expected = x[:, :rows] @ matrix.dequantize().T
        found = run_product(tmp_path, matrix, np.ascontiguousarray(x[:, :rows]))
        # Inputs are of size 1 and stand exactly at a code; what is left is float32 rounding of K terms.
        np.testing.assert_allclose(found, expected, atol=K * 1e-2, rtol=0)
        assert np.abs(found - expected).max() <= 0.01 * np.abs(expected).max()


def test_eight_dynamic_bits_saturate_where_the_cpu_says_so(tmp_path):
    weights, x = worst_case()[0]
    matrix = quantize_dynamic(weights, bits=8)
    error = np.abs(run_product(tmp_path, matrix, x) - x @ matrix.dequantize().T).max() / K
    # 255 * 127 * 2 is cut to 32767: half of the sum is lost. A CPU with a dot product loses nothing.
    exact = sums_int8_exactly(describe_cpu()["isa"])
    assert (error < 0.01) == exact


def test_float_products_are_those_of_numpy(tmp_path):
    r = np.random.default_rng(0)
    weights, x = r.standard_normal((N, K)).astype(np.float32), r.standard_normal((2, 3, K)).astype(np.float32)
    # K products of order 1, summed in another order.
    np.testing.assert_allclose(run_product(tmp_path, FloatMatrix(weights), x), x @ weights.T, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_values_are_within_half_a_step(bits):
    weights = np.random.default_rng(0).standard_normal((N, 100)).astype(np.float32)
    matrix = quantize_blocks(weights, bits=bits, block_size=32)
    assert matrix.codes_NCE.shape == (N, 4, 32)  # 100 is no multiple of any block size: the last block is padded
    step = np.abs(np.repeat(matrix.scales_NC, 32, axis=1)[:, :100])
    # At 4 bits the end opposite to the largest value has 7 steps instead of 8, so it may be clipped by one step.
    assert (np.abs(matrix.dequantize() - weights) <= step * (0.5 if bits == 8 else 1.0) + 1e-6).all()


@pytest.mark.parametrize(
    ("width", "wanted", "expected"), [(576, 128, 64), (512, 128, 128), (256, 256, 256), (100, 64, 64)]
)
def test_blocks_divide_the_width_where_one_does(width, wanted, expected):
    assert block_size_for(width, wanted) == expected


def test_a_matrix_of_zeros_stays_zero():
    zeros = np.zeros((4, 64), np.float32)
    for encode in FORMATS.values():
        assert not encode(zeros).dequantize().any()


def random_blocks(bits, size, rows=N, width=K, seed=0):
    """A matrix with every code and every zero point somewhere, and scales that differ."""
    r = np.random.default_rng(seed)
    codes = r.integers(0, 1 << bits, (rows, -(-width // size), size), dtype=np.uint8)
    zeros = r.integers(0, 1 << bits, codes.shape[:2], dtype=np.uint8)
    scales = r.uniform(0.5, 1.5, codes.shape[:2]).astype(np.float32)
    return BlockMatrix(codes, scales, bits, width, zeros)


@pytest.mark.parametrize("width", [256, 224])
@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_are_what_the_runtime_multiplies_with(bits, size, width, tmp_path):
    matrix = random_blocks(bits, size, width=width)
    # Whole numbers up to 127 whose largest is in every block: int8 holds them exactly, so no rounding is left.
    x = np.random.default_rng(1).integers(-127, 128, (1, 3, width)).astype(np.float32)
    x[..., ::16] = 127
    expected = x.astype(np.float64) @ matrix.dequantize().astype(np.float64).T
    found = run_product(tmp_path, matrix, x)
    # float32 sums of some hundred terms.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_with_zero_points_are_looked_up(bits, size, tmp_path):
    matrix = random_blocks(bits, size)
    ids = np.array([[0, N - 1, 7]])
    with DataFile(tmp_path / "data") as data:
        g = blocks.GraphBuilder("lookup", data)
        g.input("ids", TensorProto.INT64, ["B", "S"])
        g.output(blocks.embed(g, "ids", "table", matrix), TensorProto.FLOAT, ["B", "S", K])
        model = g.model()
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    found = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"ids": ids})[0]
    np.testing.assert_allclose(found, matrix.dequantize()[ids], rtol=1e-6)


def test_equal_contents_share_their_place_and_large_ones_begin_a_page(tmp_path):
    large = np.arange(LARGE_BYTES, dtype=np.uint8)
    with DataFile(tmp_path / "data") as data:
        first = data.tensor("a", np.arange(100, dtype=np.int32))
        second = data.tensor("b", large.reshape(16, -1))
        again = data.tensor("c", large.reshape(-1, 2))
    place = [{e.key: e.value for e in t.external_data} for t in (first, second, again)]
    assert place[0]["offset"] == "0"
    assert place[1]["offset"] == place[2]["offset"] == str(PAGE_BYTES)
    assert (tmp_path / "data").stat().st_size == PAGE_BYTES + LARGE_BYTES
    assert (tmp_path / "data").read_bytes()[PAGE_BYTES:] == large.tobytes()
