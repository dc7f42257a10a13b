"""Named blocks of a decoder in onnxruntime's fused CPU operators.

    # B batch, S new tokens, P past tokens, T total tokens, N output features, K input features,
    # D model dim, F feed-forward dim, V vocabulary, H head dim

Each block adds nodes to a `GraphBuilder` and returns the name of its result. Names follow `Decoder.state_dict()`.
`MS` operators are onnxruntime's own (domain com.microsoft); their inputs are listed in its ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

import ryot
from ryot.config import GraphAttention
from ryot.deploy.datafile import DataFile
from ryot.deploy.matrices import BlockMatrix, DynamicMatrix, FloatMatrix, Matrix, OffsetBlockMatrix
from ryot.models.spec import Activation, Norm
from ryot.models.tensors import FloatArray

MS = "com.microsoft"
OPSET = 21
IR_VERSION = 10
#: MatMulNBits' accuracy level that quantizes activations to int8; the others compute in float32, far slower.
INT8_ACTIVATIONS = 4


class GraphBuilder:
    """Collects nodes, inputs, outputs and constants, and makes the model of them."""

    def __init__(self, name: str, data: DataFile):
        self.name = name
        self._data = data
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._known: set[str] = set()

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare an input of the graph."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        self._known.add(name)
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declare a result that some node has already made as an output of the graph."""
        assert name in self._known, f"output {name} is made by no node"
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def constant(self, name: str, array: NDArray[np.generic]) -> str:
        """A constant; asked for twice under one name with the same values it is the same one."""
        tensor = self._data.tensor(name, array)
        if name not in self._constants:
            self._constants[name] = tensor
            self._known.add(name)
        if self._constants[name] != tensor:
            raise ValueError(f"constant {name} is asked for with other values than before")
        return name

    def node(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node named after its first output, which is returned. An empty input or output name is one left out."""
        missing = [name for name in inputs if name and name not in self._known]
        assert not missing, f"{op} {outputs[0]}: inputs {missing} are made by no earlier node"
        repeated = [name for name in outputs if name in self._known]
        assert not repeated, f"{op}: {repeated} is made twice"
        self._nodes.append(
            helper.make_node(op, list(inputs), list(outputs), name=outputs[0], domain=domain, **attributes)
        )
        self._known.update(name for name in outputs if name)
        return outputs[0]

    def choose(
        self,
        condition: str,
        then: Callable[[], Sequence[str]],
        otherwise: Callable[[], Sequence[str]],
        outputs: Sequence[str],
        kinds: Sequence[int],
    ) -> str:
        """Results of one of two branches as `outputs`, whose first name is returned.

        A branch adds its nodes, which may use all that was made before, and gives the names of its results.
        """
        branches = []
        for build in (then, otherwise):
            outer, self._nodes = self._nodes, []
            results = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(build(), kinds)]
            branches.append(helper.make_graph(self._nodes, f"{outputs[0]}.{build.__name__}", [], results))
            self._nodes = outer
        return self.node("If", [condition], outputs, then_branch=branches[0], else_branch=branches[1])

    def model(self) -> onnx.ModelProto:
        """The finished model; constants are in the order of their first use."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, list(self._constants.values()))
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)],
            ir_version=IR_VERSION,
            producer_name="ryot",
            producer_version=ryot.__version__,
        )


def linear(
    g: GraphBuilder,
    x: str,
    name: str,
    matrix: Matrix,
    bias: FloatArray | None = None,
    out: str = "",
    *,
    row_factor: str = "",
) -> str:
    """`x @ matrix.T + bias`, [B, S, K] to [B, S, N], with the operator that fits the matrix's format.

    Where the matrix is a dynamic one, `x` may lack a factor [B, S, 1], as `gated_rows` leaves it.
    """
    assert not row_factor or isinstance(matrix, DynamicMatrix)
    out = out or f"{name}.out"
    bias_name = g.constant(f"{name}.bias", bias) if bias is not None else ""
    match matrix:
        case FloatMatrix(values_NK):
            product = out if bias is None else f"{name}.product"
            weight = g.constant(f"{name}.weight", values_NK)
            g.node("FusedMatMul", [x, weight], [product], domain=MS, transB=1)
            return product if bias is None else g.node("Add", [product, bias_name], [out])
        case DynamicMatrix():
            codes, sizes = _round_rows(g, x, name)
            if row_factor:
                sizes = g.node("Mul", [sizes, row_factor], [f"{name}.all_sizes"])
            product = _multiply_codes(g, codes, name, matrix)
            product = g.node("Mul", [product, sizes], [out if bias is None else f"{name}.product"])
            return product if bias is None else g.node("Add", [product, bias_name], [out])
        case OffsetBlockMatrix():
            return linear(g, _with_block_sums(g, x, name, matrix.blocks), name, matrix.joined(), bias, out)
        case BlockMatrix():
            inputs = [
                x,
                g.constant(f"{name}.q{matrix.bits}", matrix.packed()),
                g.constant(f"{name}.q{matrix.bits}_scales", matrix.scales_NC),
                _zero_points(g, name, matrix),
                "",  # order of the inputs, which is not used
                bias_name,
            ]
            while not inputs[-1]:
                inputs.pop()
            return g.node(
                "MatMulNBits",
                inputs,
                [out],
                domain=MS,
                bits=matrix.bits,
                block_size=matrix.block_size,
                N=len(matrix.codes_NCE),
                K=matrix.num_inputs,
                accuracy_level=INT8_ACTIVATIONS,
            )


def embed(g: GraphBuilder, ids: str, name: str, matrix: Matrix) -> str:
    """Rows of the table [V, D], [B, S] to [B, S, D]; a block-quantized table is dequantized row by row."""
    out = f"{name}.out"
    if isinstance(matrix, FloatMatrix):
        return g.node("Gather", [g.constant(f"{name}.weight", matrix.values_NK), ids], [out])
    assert isinstance(matrix, BlockMatrix) and matrix.num_inputs % matrix.block_size == 0, "an embedding has no padding"
    # The same bytes as a tied head's MatMulNBits reads, under the shape that this operator wants.
    packed_VD = matrix.packed().reshape(len(matrix.codes_NCE), -1)
    table = g.constant(f"{name}.q{matrix.bits}_rows", packed_VD)
    scales = g.constant(f"{name}.q{matrix.bits}_scales", matrix.scales_NC)
    zeros = _zero_points(g, name, matrix)
    return g.node(
        "GatherBlockQuantized",
        [table, ids, scales, zeros] if zeros else [table, ids, scales],
        [out],
        domain=MS,
        bits=matrix.bits,
        block_size=matrix.block_size,
        gather_axis=0,
        quantize_axis=1,
    )


def _round_rows(g: GraphBuilder, x: str, name: str) -> tuple[str, str]:
    """uint8 codes of [B, S, K] and the size [B, S, 1] of each token's largest value, which has the code 1 or 255.

    A token has a scale of its own: one for a whole call, as `DynamicQuantizeMatMul` takes it, makes what a token comes
    to depend on whatever else is computed with it. Reductions both ways take less time than one of absolute values.
    """
    axis = g.constant("last_axis", np.array([-1], np.int64))
    high = g.node("ReduceMax", [x, axis], [f"{name}.high"], keepdims=1)
    low = g.node("Neg", [g.node("ReduceMin", [x, axis], [f"{name}.low"], keepdims=1)], [f"{name}.minus_low"])
    floor = g.constant("smallest_row", np.array(1e-30, np.float32))
    sizes = g.node("Max", [high, low, floor], [f"{name}.sizes"])
    even = g.node("Div", [x, sizes], [f"{name}.even_inputs"])
    scale, zero = np.array(1 / 127, np.float32), np.array(128, np.uint8)
    inputs = [even, g.constant("row_scale", scale), g.constant("row_zero", zero)]
    return g.node("QuantizeLinear", inputs, [f"{name}.codes"]), sizes


def _multiply_codes(g: GraphBuilder, codes: str, name: str, matrix: DynamicMatrix) -> str:
    """Codes of `_round_rows` times a matrix; each token's size is still to be multiplied with."""
    weight = g.constant(f"{name}.int8", matrix.codes_NK.T)
    scales = g.constant(f"{name}.int8_scales", matrix.scales_N)
    return g.node("MatMulIntegerToFloat", [codes, weight, "row_scale", scales, "row_zero"], [f"{name}.even"], domain=MS)


def gated_rows(g: GraphBuilder, x: str, name: str, matrix: DynamicMatrix, kind: Activation) -> tuple[str, str]:
    """`activation(gate) * up` but for a factor, and that factor [B, S, 1], of a dynamic matrix [2F, K], gate first.

    Two products of the same codes, so that nothing is to be split; of them only the gate has to have its size: that of
    the other one is left to the product that follows, whose rounding does not look at it.
    """
    codes, sizes = _round_rows(g, x, name)
    half = len(matrix.scales_N) // 2
    gate, up = (
        _multiply_codes(g, codes, f"{name}.{part}", DynamicMatrix(matrix.codes_NK[rows], matrix.scales_N[rows]))
        for part, rows in (("gate", slice(half)), ("up", slice(half, None)))
    )
    gate = g.node("Mul", [gate, sizes], [f"{name}.gate"])
    active = activate(g, gate, kind, f"{name}.{kind}")
    return g.node("Mul", [active, up], [f"{name}.product_of_gate_and_up"]), sizes


def _with_block_sums(g: GraphBuilder, x: str, name: str, matrix: BlockMatrix) -> str:
    """[B, S, K] to [B, S, K + C]: the inputs, and behind them the sums of their blocks."""
    C, E = matrix.codes_NCE.shape[1:]
    shape = g.constant(f"blocks_of_inputs.{C}x{E}", np.array([0, 0, C, E], np.int64))
    cut = g.node("Reshape", [x, shape], [f"{name}.input_blocks"])
    sums = g.node("ReduceSum", [cut, g.constant("last_axis", np.array([-1], np.int64))], [f"{name}.sums"], keepdims=0)
    return g.node("Concat", [x, sums], [f"{name}.inputs_and_sums"], axis=-1)


def _zero_points(g: GraphBuilder, name: str, matrix: BlockMatrix) -> str:
    """The zero codes of a matrix that has its own; no name where the operator's default holds."""
    zeros = matrix.packed_zeros()
    return "" if zeros is None else g.constant(f"{name}.q{matrix.bits}_zeros", zeros)


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A norm over the last axis."""

    kind: Norm
    epsilon: float
    weight: FloatArray
    bias: FloatArray | None

    def constants(self, g: GraphBuilder, name: str) -> list[str]:
        """Names of its constants, in the order in which operators take them."""
        names = [g.constant(f"{name}.weight", self.weight)]
        return names if self.bias is None else [*names, g.constant(f"{name}.bias", self.bias)]


def norm(g: GraphBuilder, x: str, name: str, weights: NormWeights) -> str:
    """RMSNorm or LayerNorm of x."""
    inputs = [x, *weights.constants(g, name)]
    if weights.kind == "layer":
        return g.node("LayerNormalization", inputs, [f"{name}.out"], axis=-1, epsilon=weights.epsilon)
    return g.node(
        "SimplifiedLayerNormalization", inputs, [f"{name}.out"], axis=-1, epsilon=weights.epsilon, stash_type=1
    )


def add_norm(
    g: GraphBuilder,
    x: str,
    residual: str,
    name: str,
    weights: NormWeights,
    x_bias: FloatArray | None = None,
    *,
    keep_sum: bool = True,
) -> tuple[str, str]:
    """(norm(x + its bias + residual), the sum) in one node; without `keep_sum` the second name is empty."""
    inputs = [residual, x, *weights.constants(g, name)]
    if x_bias is not None:
        inputs.append(g.constant(f"{name}.input_bias", x_bias))
    total = f"{name}.residual" if keep_sum else ""
    outputs = [f"{name}.out", "", "", total] if keep_sum else [f"{name}.out"]
    op = "SkipSimplifiedLayerNormalization" if weights.kind == "rms" else "SkipLayerNormalization"
    normed = g.node(op, inputs, outputs, domain=MS, epsilon=weights.epsilon)
    return normed, total


def head_norms(
    g: GraphBuilder, qkv: Sequence[str], name: str, norms: Sequence[NormWeights], head_dim: int
) -> tuple[str, str, str]:
    """Queries, keys and values of which each head of the queries and of the keys is normed by itself."""
    by_head = g.constant("by_head", np.array([0, 0, -1, head_dim], np.int64))
    together = g.constant("heads_together", np.array([0, 0, -1], np.int64))
    normed = []
    for x, weights, part in zip(qkv, norms, ("q", "k")):
        heads = g.node("Reshape", [x, by_head], [f"{name}.{part}_heads"])
        heads = norm(g, heads, f"{name}.{part}_norm", weights)
        normed.append(g.node("Reshape", [heads, together], [f"{name}.{part}_normed"]))
    return normed[0], normed[1], qkv[2]


def split_qkv(g: GraphBuilder, qkv: str, name: str, q_dim: int, kv_dim: int) -> tuple[str, str, str]:
    """Queries, keys and values of packed ones."""
    sizes = g.constant("qkv_sizes", np.array([q_dim, kv_dim, kv_dim], np.int64))
    parts = (f"{name}.q", f"{name}.k", f"{name}.v")
    g.node("Split", [qkv, sizes], parts, axis=-1)
    return parts


def attention(
    g: GraphBuilder,
    qkv: Sequence[str],
    name: str,
    past: Sequence[str],
    present: Sequence[str],
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    rotary: tuple[str, str] | None,
    lengths: tuple[str, str],
    kernel: GraphAttention,
    kv_scales: tuple[str, str] | None = None,
    per_channel: bool = False,
) -> str:
    """Causal attention over queries, keys and values and the keys and values of the `past`; makes the `present`.

    `qkv` is one packed array or three. A token attends to the last `window` ones, itself included, or to all at 0.
    Past and present may be bound to one buffer of the full context, which is then written in place; names of the past
    that are empty stand for an empty past. Keys are stored rotated. `lengths` are seqlens_k (total length of each row,
    minus 1) and the total length. With `kv_scales` the cache holds int8, scaled by one value for all or `per_channel`.

    The operator has two kernels and no attribute to choose: it works in tiles (`flash`) unless it is given something
    that its tiles cannot do. A head sink is such a thing, and one this small takes no weight from any key. All scores
    at once (`full`) take [B, heads, S, T] floats and, for prompts of some hundred tokens, less time.
    """
    attributes: dict[str, object] = {"num_heads": num_heads, "kv_num_heads": num_kv_heads, "scale": scale}
    if window:
        attributes["local_window_size"] = window
    if rotary is not None:
        attributes["do_rotary"] = 1
    sink = g.constant("no_head_sink", np.full(num_heads, -1e30, np.float32)) if kernel == "full" else ""
    # Behind the tables come positions and an attention bias, which are not used here.
    optional = [*(rotary or ("", "")), "", "", sink, *(kv_scales or ("", ""))]
    while optional and not optional[-1]:
        optional.pop()
    inputs = [*qkv, *([""] * (3 - len(qkv))), *past, *lengths, *optional]
    if kv_scales is not None:
        kind = "PER_CHANNEL" if per_channel else "PER_TENSOR"
        attributes |= {"kv_cache_bit_width": 8, "k_quant_type": kind, "v_quant_type": kind}
    return g.node("GroupQueryAttention", inputs, [f"{name}.mix", *present], domain=MS, **attributes)


def activate(g: GraphBuilder, x: str, kind: Activation, out: str) -> str:
    """The activation of x."""
    match kind:
        case "silu":
            # QuickGelu(x) is x * sigmoid(alpha * x): SiLU at alpha 1.
            return g.node("QuickGelu", [x], [out], domain=MS, alpha=1.0)
        case "gelu":
            return g.node("Gelu", [x], [out], domain=MS)
        case "gelu_tanh":
            return g.node("FastGelu", [x], [out], domain=MS)
        case "relu":
            return g.node("Relu", [x], [out])


def gated(g: GraphBuilder, gate_up: str, name: str, activation: Activation) -> str:
    """`activation(gate) * up` of [B, S, 2F], gate first."""
    gate, up = f"{name}.gate", f"{name}.up"
    g.node("Split", [gate_up], [gate, up], axis=-1, num_outputs=2)
    active = activate(g, gate, activation, f"{name}.{activation}")
    return g.node("Mul", [active, up], [f"{name}.product_of_gate_and_up"])


def bias_gelu(g: GraphBuilder, x: str, name: str, bias: FloatArray) -> str:
    """Exact (erf) GELU of `x + bias`."""
    return g.node("BiasGelu", [x, g.constant(f"{name}.bias", bias)], [f"{name}.gelu"], domain=MS)


def scaled(g: GraphBuilder, x: str, factor: float, out: str) -> str:
    """x times a constant; x itself at 1."""
    if factor == 1:
        return x
    return g.node("Mul", [x, g.constant(f"{out}.factor", np.array(factor, np.float32))], [out])


def last_position(g: GraphBuilder, x: str) -> str:
    """[B, S, …] to [B, 1, …]: what follows is computed for the last token only."""
    index = g.constant("last_index", np.array([-1], dtype=np.int64))
    return g.node("Gather", [x, index], [f"{x}.last"], axis=1)


def lengths_from_mask(g: GraphBuilder, mask: str) -> tuple[str, str]:
    """(seqlens_k, total length) of an attention mask [B, T] of ones, padded with zeros on the right."""
    axis = g.constant("mask_axis", np.array([1], dtype=np.int64))
    one = g.constant("one", np.array(1, dtype=np.int64))
    lengths = g.node("ReduceSum", [mask, axis], ["mask.lengths"], keepdims=0)
    last = g.node("Sub", [lengths, one], ["mask.last"])
    shape = g.node("Shape", [mask], ["mask.shape"])
    total = g.node("Gather", [shape, one], ["mask.total"], axis=0)
    return (
        g.node("Cast", [last], ["seqlens_k"], to=TensorProto.INT32),
        g.node("Cast", [total], ["total_sequence_length"], to=TensorProto.INT32),
    )
