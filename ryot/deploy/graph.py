"""Builds the onnxruntime graphs of a decoder straight from its weights.

Four graphs, made of the same blocks and the same bytes:

    standard   what other runtimes expect: attention_mask in, logits of all positions out
    fast       lengths in, the next token and the logits of the last position out; any number of new tokens
    prefill    `fast` for prompts; attends in float32 to what an int8 cache holds and to the new tokens, and only then
               rounds their keys and values
    decode     `fast` for exactly one new token

Requires: arrays of the shapes that `models.spec.parameter_shapes` gives, all finite, and a format for each matrix.
Ensures: nodes are in topological order and every name is made once (`GraphBuilder` asserts both), and every constant
of `datafile.INLINE_BELOW_BYTES` or more lies in the shared data file, each distinct content once. onnx's own checker
does not know the fused operators; onnxruntime's, which checks them when it loads the graph, is the one that counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from ryot.config import GraphAttention
from ryot.deploy import blocks
from ryot.deploy.blocks import GraphBuilder, NormWeights
from ryot.deploy.datafile import DataFile
from ryot.deploy.int8_cache import Int8Cache, attend_to_int8, cache_positions, count_new_tokens, load_int8, store_int8
from ryot.deploy.matrices import DynamicMatrix, FloatMatrix, Matrix
from ryot.deploy.weights import DecoderWeights
from ryot.models.angles import rotary_tables
from ryot.models.tensors import FloatArray

GraphKind = Literal["standard", "fast", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class KVScales:
    """Scales of an int8 KV cache: of each layer's keys and values, one a channel [kv_dim] or one for all [1]."""

    keys: tuple[FloatArray, ...]
    values: tuple[FloatArray, ...]

    @property
    def per_channel(self) -> bool:
        """Whether channels have scales of their own."""
        return len(self.keys[0]) > 1

    def per_tensor(self) -> KVScales:
        """One scale for all channels, the largest of theirs: coarser, and faster to read with."""
        keys, values = (tuple(s.max(keepdims=True) for s in part) for part in (self.keys, self.values))
        return KVScales(keys=keys, values=values)


def matrix_names(weights: DecoderWeights) -> list[str]:
    """Every matrix of the decoder, without `.weight`: the embedding, and those of products in their order."""
    return list(dict.fromkeys(("embedding", *weights.linears)))


def float_matrices(weights: DecoderWeights) -> dict[str, Matrix]:
    """Every matrix of the decoder, unquantized."""
    return {name: FloatMatrix(weights[f"{name}.weight"]) for name in matrix_names(weights)}


def build_graph(
    kind: GraphKind,
    weights: DecoderWeights,
    matrices: Mapping[str, Matrix],
    data: DataFile,
    *,
    kv_scales: KVScales | None = None,
    attention: GraphAttention = "flash",
) -> onnx.ModelProto:
    """One graph of the decoder; its constants go to `data`."""
    return _DecoderGraph(kind, weights, matrices, data, kv_scales, attention).build()


class _Stream:
    """The residual stream: a sum, and a branch's output that is not added yet, so that the next norm can add it."""

    def __init__(self, total: str):
        self.total = total
        self.pending: str | None = None
        self.pending_bias: FloatArray | None = None

    def add(self, x: str, bias: FloatArray | None = None) -> None:
        """Leave `x` and its bias to be added."""
        assert self.pending is None
        self.pending, self.pending_bias = x, bias


class _DecoderGraph:
    def __init__(
        self,
        kind: GraphKind,
        weights: DecoderWeights,
        matrices: Mapping[str, Matrix],
        data: DataFile,
        kv_scales: KVScales | None,
        attention: GraphAttention,
    ):
        self.kind, self.weights, self.matrices = kind, weights, matrices
        self.kv_scales, self.attention = kv_scales, attention
        self.spec = weights.spec
        self.g = GraphBuilder(f"{self.spec.family}_{kind}", data)
        #: Factors [B, S, 1] that inputs of a product still lack; see `blocks.gated_rows`.
        self.row_factors: dict[str, str] = {}

    def build(self) -> onnx.ModelProto:
        new = 1 if self.kind == "decode" else "sequence_length"
        ids = self.g.input("input_ids", TensorProto.INT64, ["batch", new])
        self.lengths = self._lengths()
        self.past = [self._past(i) for i in range(self.spec.num_layers)]
        if self.kind == "prefill" and self.kv_scales is not None:
            self.held, self.unused = cache_positions(self.g, self.past[0][0], self.lengths[1], ids)
        if self.kind == "fast" and self.kv_scales is not None:
            self.new = count_new_tokens(self.g, ids, self.lengths[1])
        positions = None
        if self.spec.learned_positions:
            positions = self.g.input("position_ids", TensorProto.INT64, ["batch", new])
        embedded = self._embed(ids, positions)
        self._head(self._trunk(embedded))
        return self.g.model()

    def _lengths(self) -> tuple[str, str]:
        if self.kind == "standard":
            mask = self.g.input("attention_mask", TensorProto.INT64, ["batch", "total_length"])
            return blocks.lengths_from_mask(self.g, mask)
        return (
            self.g.input("seqlens_k", TensorProto.INT32, ["batch"]),
            self.g.input("total_sequence_length", TensorProto.INT32, []),
        )

    @property
    def _cache_type(self) -> int:
        return TensorProto.FLOAT if self.kv_scales is None else TensorProto.INT8

    def _past(self, layer: int) -> list[str]:
        shape: list[int | str] = ["batch", self.spec.num_kv_heads, "past_length", self.spec.head_dim]
        return [self.g.input(f"past_key_values.{layer}.{part}", self._cache_type, shape) for part in ("key", "value")]

    def _embed(self, ids: str, positions: str | None) -> str:
        g, spec = self.g, self.spec
        x = blocks.embed(g, ids, "embedding", self.matrices["embedding"])
        if spec.embedding_scale:
            x = g.node("Mul", [x, g.constant("embedding_scale", self.weights["embedding_scale"])], ["embedding.even"])
        x = blocks.scaled(g, x, spec.embedding_multiplier, "embedding.scaled")
        if spec.embed_dim:
            x = self._linear(x, "project_in")
        if positions is None:
            return x
        # The offset is taken off the table here, so that position 0 is row 0.
        table = np.ascontiguousarray(self.weights["positions.weight"][spec.position_offset :])
        return g.node("Add", [x, blocks.embed(g, positions, "positions", FloatMatrix(table))], ["embedded"])

    def _trunk(self, x: str) -> str:
        """All layers and what stands before the output matrix."""
        spec = self.spec
        self.stream = _Stream(x)
        self.rotaries = [self._rotary_tables(kind) for kind in range(len(spec.rotaries))]
        layer = self._parallel_layer if spec.parallel_residual else self._layer
        for i in range(spec.num_layers):
            layer(i, f"layers.{i}", last=i == spec.num_layers - 1)
        x = self._normed("final_norm") if spec.final_norm else self._added("final_residual")
        if spec.embed_dim:
            x = self._linear(x, "project_out")
        return blocks.scaled(self.g, x, spec.logit_multiplier, "logit_inputs")

    def _layer(self, i: int, name: str, *, last: bool) -> None:
        x = self._branch_input(f"{name}.attn_norm")
        x = self._attention(x, i)
        if last:
            x = self._drop_positions(x)
            self.stream.total = self._drop_positions(self.stream.total)
        self._join(x, f"{name}.attn.out", f"{name}.attn")
        x = self._branch_input(f"{name}.ff_norm")
        self._join(self._activated(x, name), f"{name}.down", f"{name}.ff")

    def _parallel_layer(self, i: int, name: str, *, last: bool) -> None:
        x = self._attention(self._normed(f"{name}.attn_norm"), i)
        if last:
            x = self._drop_positions(x)
            self.stream.total = self._drop_positions(self.stream.total)
        attended = self._linear(x, f"{name}.attn.out", bias=True)
        x = self._activated(self._normed(f"{name}.ff_norm"), name)
        both = self.g.node("Add", [attended, self._linear(x, f"{name}.down", bias=True)], [f"{name}.branches"])
        self.stream.add(both)

    def _branch_input(self, norm: str) -> str:
        """What attention or feed-forward reads: the stream, normed where its norm stands before the branch."""
        if self.spec.norm_place in ("pre", "sandwich"):
            return self._normed(norm)
        return self._added(f"{norm}.input")

    def _join(self, x: str, linear: str, branch: str) -> None:
        """Add `linear(x)` to the stream, with the norm of the branch where one stands behind it."""
        spec, stream = self.spec, self.stream
        folded = spec.norm_place in ("pre", "post") and spec.residual_multiplier == 1
        bias = self.weights.get(f"{linear}.bias") if folded else None
        y = self._linear(x, linear, bias=not folded)
        match spec.norm_place:
            case "post":
                weights = self._norm_weights(f"{branch}_norm")
                stream.total, _ = blocks.add_norm(
                    self.g, y, stream.total, f"{branch}_norm", weights, bias, keep_sum=False
                )
                return
            case "output" | "sandwich":
                norm = f"{branch}_norm" if spec.norm_place == "output" else f"{branch}_post_norm"
                y = blocks.norm(self.g, y, norm, self._norm_weights(norm))
        stream.add(blocks.scaled(self.g, y, spec.residual_multiplier, f"{branch}.scaled"), bias)

    def _normed(self, name: str) -> str:
        """A norm of the stream; what is pending is added on the way."""
        stream, weights = self.stream, self._norm_weights(name)
        if stream.pending is None:
            return blocks.norm(self.g, stream.total, name, weights)
        x, bias = stream.pending, stream.pending_bias
        stream.pending = stream.pending_bias = None
        normed, stream.total = blocks.add_norm(self.g, x, stream.total, name, weights, bias)
        return normed

    def _added(self, name: str) -> str:
        """The stream itself, with what is pending."""
        stream = self.stream
        if stream.pending is not None:
            stream.total = self.g.node("Add", [stream.total, stream.pending], [name])
            if stream.pending_bias is not None:
                bias = self.g.constant(f"{name}.input_bias", stream.pending_bias)
                stream.total = self.g.node("Add", [stream.total, bias], [f"{name}.biased"])
            stream.pending = stream.pending_bias = None
        return stream.total

    def _norm_weights(self, name: str) -> NormWeights:
        weights = self.weights
        return NormWeights(self.spec.norm, self.spec.norm_eps, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def _activated(self, x: str, name: str) -> str:
        """Feed-forward up to its second matrix."""
        spec = self.spec
        if spec.gated:
            matrix, following = (self.matrices[f"{name}.{part}"] for part in ("gate_up", "down"))
            unbiased = self.weights.get(f"{name}.gate_up.bias") is None
            if unbiased and isinstance(matrix, DynamicMatrix) and isinstance(following, DynamicMatrix):
                product, self.row_factors[product] = blocks.gated_rows(
                    self.g, x, f"{name}.gate_up", matrix, spec.activation
                )
                return product
            return blocks.gated(self.g, self._linear(x, f"{name}.gate_up", bias=True), name, spec.activation)
        up = f"{name}.up"
        if spec.activation == "gelu" and spec.ff_bias:
            return blocks.bias_gelu(self.g, self._linear(x, up), up, self.weights[f"{up}.bias"])
        return blocks.activate(self.g, self._linear(x, up, bias=True), spec.activation, f"{up}.{spec.activation}")

    def _drop_positions(self, x: str) -> str:
        # In the last layer only attention looks at other positions; what follows it is needed for one token.
        return blocks.last_position(self.g, x) if self.kind in ("fast", "prefill") else x

    def _linear(self, x: str, name: str, *, bias: bool = False, out: str = "") -> str:
        """`x` times a matrix, plus its bias where it has one and that is asked for."""
        vector = self.weights.get(f"{name}.bias") if bias else None
        factor = self.row_factors.get(x, "")
        return blocks.linear(self.g, x, name, self.matrices[name], vector, out, row_factor=factor)

    def _attention(self, x: str, layer: int) -> str:
        g, spec, name = self.g, self.spec, f"layers.{layer}"
        qkv, kind = self._qkv(x, f"{name}.attn"), spec.rotary_kind(layer)
        past, present = self.past[layer], [f"present.{layer}.key", f"present.{layer}.value"]
        attend = functools.partial(
            blocks.attention,
            g,
            qkv,
            name=f"{name}.attn",
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            scale=spec.scale,
            window=spec.window(layer),
            rotary=None if kind < 0 else self.rotaries[kind],
            lengths=self.lengths,
            kernel=self.attention,
        )
        if self.kv_scales is None:
            mixed = attend(past=past, present=present)
        elif self.kind == "prefill":
            exact = [f"{name}.keys", f"{name}.values"]
            both = [self.kv_scales.keys[layer], self.kv_scales.values[layer]]
            held = [load_int8(g, c, s, spec.head_dim, self.held) for c, s in zip(past, both, strict=True)]
            mixed = attend(past=held, present=exact)
            for x, of_layer, cache in zip(exact, both, present, strict=True):
                store_int8(g, x, of_layer, spec.head_dim, self.unused, cache)
        else:
            scales = (
                g.constant(f"{name}.key_scales", self.kv_scales.keys[layer]),
                g.constant(f"{name}.value_scales", self.kv_scales.values[layer]),
            )
            attend = functools.partial(attend, kv_scales=scales, per_channel=self.kv_scales.per_channel)
            mixed = (
                self._attend_to_int8(attend, qkv, layer, past, present)
                if self.kind == "fast"
                else attend(past=past, present=present)
            )
        for cache in present:
            g.output(cache, self._cache_type, ["batch", spec.num_kv_heads, "total_length", spec.head_dim])
        return mixed

    def _attend_to_int8(
        self, attend: Callable[..., str], qkv: Sequence[str], layer: int, past: Sequence[str], present: Sequence[str]
    ) -> str:
        """Attention of any number of new tokens over an int8 cache; `attend` is the fused operator."""
        spec, kind = self.spec, self.spec.rotary_kind(layer)
        assert self.kv_scales is not None
        rotary = None if kind < 0 else self.rotaries[kind]
        return attend_to_int8(
            self.g,
            qkv,
            f"layers.{layer}.attn",
            Int8Cache(past, present, (self.kv_scales.keys[layer], self.kv_scales.values[layer])),
            self.new,
            lambda kept, name: attend(past=past, present=kept, name=name),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.scale,
            window=spec.window(layer),
            rotary=rotary,
            rotary_dim=0 if kind < 0 else 2 * rotary_tables(spec.rotaries[kind], 1)[0].shape[1],
            lengths=self.lengths,
        )

    def _qkv(self, x: str, name: str) -> Sequence[str]:
        """Queries, keys and values: packed, or three where they are normed."""
        g, spec = self.g, self.spec
        packed = self._linear(x, f"{name}.qkv", bias=True)
        if spec.qk_norm == "none":
            return [packed]
        parts = blocks.split_qkv(g, packed, name, spec.q_dim, spec.kv_dim)
        norms = [
            NormWeights("rms", spec.norm_eps, self.weights[f"{name}.{part}_norm.weight"], None) for part in ("q", "k")
        ]
        if spec.qk_norm == "head":
            return blocks.head_norms(g, parts, name, norms, spec.head_dim)
        normed = [blocks.norm(g, x, f"{name}.{part}_norm", w) for x, part, w in zip(parts, ("q", "k"), norms)]
        return [*normed, parts[2]]

    def _rotary_tables(self, kind: int) -> tuple[str, str]:
        """Names of the cosines and sines [max_seq_len, dim / 2] of one kind of rotary positions."""
        cos, sin = rotary_tables(self.spec.rotaries[kind], self.spec.max_seq_len)
        prefix = f"rotary.{kind}" if kind else "rotary"
        return self.g.constant(f"{prefix}.cos", cos), self.g.constant(f"{prefix}.sin", sin)

    def _head(self, x: str) -> None:
        logits = self._linear(x, self.weights.head, bias=True, out="logits")
        if self.kind == "standard":
            self.g.output(logits, TensorProto.FLOAT, ["batch", "sequence_length", self.spec.vocab_size])
            return
        self.g.node("ArgMax", [logits], ["next_token"], axis=-1, keepdims=0)
        self.g.output("next_token", TensorProto.INT64, ["batch", 1])
        self.g.output(logits, TensorProto.FLOAT, ["batch", 1, self.spec.vocab_size])
