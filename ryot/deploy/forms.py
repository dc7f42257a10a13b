"""What a precision means: which form each matrix of a decoder takes, and which graphs a bundle has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from ryot.config import PRECISIONS, unknown
from ryot.deploy.datafile import DataFile
from ryot.deploy.graph import GraphKind, KVScales, build_graph, float_matrices
from ryot.deploy.matrices import BlockMatrix, Matrix, block_size_for, quantize_blocks, quantize_dynamic
from ryot.deploy.weights import DecoderWeights
from ryot.errors import ConfigError

STANDARD_GRAPH = "model.onnx"


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeOptions:
    """How weights are quantized."""

    block_size: int = 128
    """Input features that share a scale in MatMulNBits; a matrix whose width it does not divide takes a smaller one."""
    dynamic_bits: int = 7
    """Bits of dynamic-int8 weights: 7 where the CPU saturates (x86 without VNNI), 8 elsewhere."""


def check_precision(precision: str) -> None:
    """Raise `ConfigError` for a name that is no precision."""
    if precision not in PRECISIONS:
        raise ConfigError(unknown("precision", precision, PRECISIONS))


def split_pair(precision: str) -> tuple[str, str]:
    """(prefill, decode) precisions; the same one twice unless it is a pair."""
    prefill, _, decode = precision.partition("+")
    return prefill, decode or prefill


def quantize_matrices(weights: DecoderWeights, precision: str, options: QuantizeOptions) -> dict[str, Matrix]:
    """Each matrix in the form of a single (not paired) precision, rounded to nearest.

    Embedding and head are blocks of 8 bits in every quantized form: a tied one serves lookup and product with the same
    bytes, and one row a token gains nothing from the dynamic kernel.
    """
    matrices = float_matrices(weights)
    if precision == "fp32":
        return matrices
    tables: dict[str, Matrix] = {
        name: quantize_table(weights, name, options) for name in ("embedding", "head") if name in matrices
    }
    inner = [name for name in weights.linears if name != "head"]
    if precision == "int8-dyn":
        linears: dict[str, Matrix] = {
            name: quantize_dynamic(weights[f"{name}.weight"], bits=options.dynamic_bits) for name in inner
        }
    else:
        bits = {"int8": 8, "int4": 4}[precision]
        linears = {
            name: quantize_blocks(weights[f"{name}.weight"], bits=bits, block_size=options.block_size) for name in inner
        }
    return {**tables, **linears}


def quantize_table(weights: DecoderWeights, name: str, options: QuantizeOptions, *, bits: int = 8) -> BlockMatrix:
    """The embedding or the head in blocks that divide the width, so that lookup and product read the same bytes."""
    block_size = block_size_for(weights.cfg.dim, options.block_size)
    return quantize_blocks(weights[f"{name}.weight"], bits=bits, block_size=block_size)


def graph_files(precision: str) -> dict[str, str]:
    """File of each role: the standard graph, and the fast ones of prefill and decode."""
    prefill, decode = split_pair(precision)
    if prefill == decode:
        return {"standard": STANDARD_GRAPH, "prefill": "fast.onnx", "decode": "fast.onnx"}
    return {"standard": STANDARD_GRAPH, "prefill": "prefill.onnx", "decode": "decode.onnx"}


def build_graphs(
    weights: DecoderWeights,
    precision: str,
    matrices: Mapping[str, Mapping[str, Matrix]],
    data: DataFile,
    *,
    kv_scales: KVScales | None = None,
) -> dict[str, onnx.ModelProto]:
    """The graphs of a form by file name; `matrices` holds the matrices of each precision that it is made of.

    A pair's standard graph is that of its decode half: the smaller error and the kernel that both phases can use.
    """
    prefill, decode = split_pair(precision)
    files = graph_files(precision)

    def build(kind: GraphKind, half: str, scales: KVScales | None = kv_scales) -> onnx.ModelProto:
        return build_graph(kind, weights, matrices[half], data, kv_scales=scales)

    # Decode's weights come first in the file: they are read at every token.
    graphs = {files["decode"]: build("fast" if prefill == decode else "step", decode)}
    if prefill != decode:
        graphs[files["prefill"]] = build("fast", prefill)
    graphs[files["standard"]] = build("standard", decode)
    return graphs


def serialize(model: onnx.ModelProto) -> bytes:
    """The model's bytes, equal for equal models."""
    return model.SerializeToString(deterministic=True)
