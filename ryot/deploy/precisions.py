"""What a precision means: which format each matrix of a decoder has, and which graphs a bundle has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from ryot.config import PRECISIONS, GraphAttention, unknown
from ryot.deploy.datafile import DataFile
from ryot.deploy.graph import GraphKind, KVScales, build_graph, float_matrices, matrix_names
from ryot.deploy.matrices import Matrix, quantize_blocks, quantize_dynamic
from ryot.deploy.settings import ExportSettings
from ryot.deploy.weights import DecoderWeights
from ryot.errors import ConfigError
from ryot.models.block_sizes import block_size_for

STANDARD_GRAPH = "model.onnx"


def check_precision(precision: str) -> None:
    """Raise `ConfigError` for a name that is no precision."""
    if precision not in PRECISIONS:
        raise ConfigError(unknown("precision", precision, PRECISIONS))


def split_pair(precision: str) -> tuple[str, str]:
    """(prefill, decode) precisions; the same one twice unless it is a pair."""
    prefill, _, decode = precision.partition("+")
    return prefill, decode or prefill


def table_names(weights: DecoderWeights) -> list[str]:
    """The embedding and, where it is a matrix of its own, the head."""
    return ["embedding"] if weights.spec.tie_embeddings else ["embedding", "head"]


def matrix_block_size(weights: DecoderWeights, name: str, wanted: int) -> int:
    """The block size of a matrix nearest to the one wanted.

    Lookup and product read the same bytes of a table only if its rows have no padding.
    """
    width = weights.spec.dim if name in table_names(weights) else weights[f"{name}.weight"].shape[1]
    return block_size_for(width, wanted)


def num_bytes(matrices: Mapping[str, Matrix]) -> int:
    """Bytes of all matrices in their formats."""
    return sum(matrix.num_bytes for matrix in matrices.values())


def quantize_matrices(weights: DecoderWeights, precision: str, settings: ExportSettings) -> dict[str, Matrix]:
    """Each matrix in the format of a single (not paired) precision, rounded to nearest.

    The embedding is in blocks in every quantized artifact, and so is a head that is tied to it: lookup and product read
    the same bytes. A head of its own has the kind of the other matrices.
    """
    if precision == "fp32":
        return float_matrices(weights)
    bits = 4 if precision == "int4" else 8
    matrices: dict[str, Matrix] = {}
    for name in matrix_names(weights):
        values = weights[f"{name}.weight"]
        if precision == "int8-dyn" and name != "embedding":
            matrices[name] = quantize_dynamic(values, bits=settings.dynamic_bits)
            continue
        block_size = settings.block_size(bits)
        if name in table_names(weights):
            # Rows without padding, which a lookup needs.
            block_size = block_size_for(weights.spec.dim, block_size)
        matrices[name] = quantize_blocks(values, bits=bits, block_size=block_size)
    return matrices


@dataclass(frozen=True, slots=True)
class ArtifactMatrices:
    """The matrices of the two fast graphs of an artifact; one and the same mapping unless it is a pair."""

    prefill: Mapping[str, Matrix]
    decode: Mapping[str, Matrix]

    @property
    def is_pair(self) -> bool:
        return self.prefill is not self.decode


def pair_matrices(
    weights: DecoderWeights, precision: str, singles: Mapping[str, Mapping[str, Matrix]]
) -> ArtifactMatrices:
    """The matrices of an artifact, made of those of the single precisions.

    A pair has one embedding and one head, those of its decode half: prefill uses them for one row per prompt.
    """
    prefill, decode = split_pair(precision)
    if prefill == decode:
        return ArtifactMatrices(singles[decode], singles[decode])
    tables = {name: singles[decode][name] for name in table_names(weights)}
    return ArtifactMatrices({**singles[prefill], **tables}, singles[decode])


def graph_files(precision: str) -> dict[str, str]:
    """File of each role: the standard graph, and the fast ones of prefill and decode."""
    prefill, decode = split_pair(precision)
    if prefill == decode:
        return {"standard": STANDARD_GRAPH, "prefill": "fast.onnx", "decode": "fast.onnx"}
    return {"standard": STANDARD_GRAPH, "prefill": "prefill.onnx", "decode": "decode.onnx"}


def build_graphs(
    weights: DecoderWeights,
    precision: str,
    matrices: ArtifactMatrices,
    data: DataFile,
    *,
    kv_scales: KVScales | None = None,
    prefill_attention: GraphAttention = "flash",
) -> dict[str, onnx.ModelProto]:
    """The graphs of an artifact by file name.

    A pair's standard graph is that of its decode half: the smaller error and the kernel that both phases can use.
    """
    files = graph_files(precision)

    def build(kind: GraphKind, chosen: Mapping[str, Matrix], attention: GraphAttention = "flash") -> onnx.ModelProto:
        return build_graph(kind, weights, chosen, data, kv_scales=kv_scales, attention=attention)

    # Decode's weights come first in the file: they are read at every token.
    graphs = {files["decode"]: build("decode" if matrices.is_pair else "fast", matrices.decode)}
    if matrices.is_pair:
        graphs[files["prefill"]] = build("prefill", matrices.prefill, prefill_attention)
    graphs[files["standard"]] = build("standard", matrices.decode)
    return graphs


def serialize(model: onnx.ModelProto) -> bytes:
    """The model's bytes, equal for equal models."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content
