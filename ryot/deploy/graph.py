"""Builds the onnxruntime graphs of a decoder straight from its weights.

Four graphs, made of the same blocks and the same bytes:

    standard   what other runtimes expect: attention_mask in, logits of all positions out
    fast       lengths in, the next token and the logits of the last position out; any number of new tokens
    prompt     `fast` for tokens before which there are none; an int8 cache is written behind attention in float32
    step       `fast` for exactly one new token

Requires: arrays of the shapes that `weights.expected_shapes` gives, all finite, and a form for each matrix.
Ensures: nodes are in topological order and every name is made once (`GraphBuilder` asserts both), and every constant
of `datafile.INLINE_BELOW_BYTES` or more lies in the shared data file, each distinct content once. onnx's own checker
does not know the fused operators; onnxruntime's, which checks them when it loads the graph, is the one that counts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from ryot.config import GraphAttention, ModelConfig
from ryot.deploy import blocks
from ryot.deploy.blocks import GraphBuilder
from ryot.deploy.datafile import DataFile
from ryot.deploy.matrices import FloatMatrix, Matrix
from ryot.deploy.weights import DecoderWeights, FloatArray
from ryot.train.model import OPT_POSITION_OFFSET

GraphKind = Literal["standard", "fast", "prompt", "step"]


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


def float_matrices(weights: DecoderWeights) -> dict[str, Matrix]:
    """Every matrix of the decoder, unquantized."""
    return {name: FloatMatrix(weights[f"{name}.weight"]) for name in ("embedding", *weights.linears)}


def rotary_tables(cfg: ModelConfig) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines [max_seq_len, H/2] of the rotary angles."""
    half = cfg.head_dim // 2
    frequencies = cfg.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    angles = np.outer(np.arange(cfg.max_seq_len, dtype=np.float64), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def build_graph(
    kind: GraphKind,
    weights: DecoderWeights,
    matrices: Mapping[str, Matrix],
    data: DataFile,
    *,
    kv_scales: KVScales | None = None,
    attention: GraphAttention = "flash",
    taps: bool = False,
) -> onnx.ModelProto:
    """One graph of the decoder; its constants go to `data`.

    With `taps` the input [batch, sequence, K] of each matrix product is an output too, named `NAME.tap`.
    """
    return _DecoderGraph(kind, weights, matrices, data, kv_scales, attention, taps).build()


class _DecoderGraph:
    def __init__(
        self,
        kind: GraphKind,
        weights: DecoderWeights,
        matrices: Mapping[str, Matrix],
        data: DataFile,
        kv_scales: KVScales | None,
        attention: GraphAttention,
        taps: bool,
    ):
        self.kind, self.weights, self.matrices, self.taps = kind, weights, matrices, taps
        self.kv_scales, self.attention = kv_scales, attention
        self.cfg = weights.cfg
        self.g = GraphBuilder(f"{self.cfg.architecture}_{kind}", data)

    def build(self) -> onnx.ModelProto:
        new = 1 if self.kind == "step" else "sequence_length"
        ids = self.g.input("input_ids", TensorProto.INT64, ["batch", new])
        self.lengths = self._lengths()
        self.past = [self._past(i) for i in range(self.cfg.num_layers)]
        if self.kind == "prompt" and self.kv_scales is not None:
            self.unused = blocks.unused_positions(self.g, self.past[0][0], ids)
        if self.cfg.architecture == "llama":
            x = self._llama_trunk(blocks.embed(self.g, ids, "embedding", self.matrices["embedding"]))
        else:
            positions = self.g.input("position_ids", TensorProto.INT64, ["batch", new])
            x = self._opt_trunk(self._embed_with_positions(ids, positions))
        self._head(x)
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
        shape: list[int | str] = ["batch", self.cfg.num_kv_heads, "past_length", self.cfg.head_dim]
        return [self.g.input(f"past_key_values.{layer}.{part}", self._cache_type, shape) for part in ("key", "value")]

    def _llama_trunk(self, x: str) -> str:
        g, cfg, w = self.g, self.cfg, self.weights
        cos, sin = rotary_tables(cfg)
        rotary = (g.constant("rotary.cos", cos), g.constant("rotary.sin", sin))
        residual = x
        x = blocks.rms_norm(g, x, "layers.0.attn_norm", w["layers.0.attn_norm.weight"], cfg.norm_eps)
        for i in range(cfg.num_layers):
            name, last = f"layers.{i}", i == cfg.num_layers - 1
            x = self._attention(self._linear(x, f"{name}.attn.qkv"), i, rotary)
            if last:
                x, residual = self._drop_positions(x), self._drop_positions(residual)
            x = self._linear(x, f"{name}.attn.out")
            norm = f"{name}.ff_norm"
            x, residual = blocks.add_rms_norm(g, x, residual, norm, w[f"{norm}.weight"], cfg.norm_eps)
            x = self._linear(blocks.swiglu(g, self._linear(x, f"{name}.gate_up"), name), f"{name}.down")
            norm = "final_norm" if last else f"layers.{i + 1}.attn_norm"
            x, residual = blocks.add_rms_norm(g, x, residual, norm, w[f"{norm}.weight"], cfg.norm_eps)
        return x

    def _opt_trunk(self, x: str) -> str:
        g, cfg, w = self.g, self.cfg, self.weights

        def add_norm(y: str, x: str, linear: str, norm: str) -> str:
            parts = (w[f"{norm}.weight"], w[f"{norm}.bias"], w[f"{linear}.bias"])
            return blocks.add_layer_norm(g, y, x, norm, parts, cfg.norm_eps)

        for i in range(cfg.num_layers):
            name, last = f"layers.{i}", i == cfg.num_layers - 1
            y = self._attention(self._linear(x, f"{name}.attn.qkv", bias=True), i, None)
            if last:
                y, x = self._drop_positions(y), self._drop_positions(x)
            x = add_norm(self._linear(y, f"{name}.attn.out"), x, f"{name}.attn.out", f"{name}.attn_norm")
            y = blocks.bias_gelu(g, self._linear(x, f"{name}.up"), f"{name}.up", w[f"{name}.up.bias"])
            x = add_norm(self._linear(y, f"{name}.down"), x, f"{name}.down", f"{name}.ff_norm")
        return x

    def _embed_with_positions(self, ids: str, positions: str) -> str:
        # The offset is taken off the table here, so that position 0 is row 0.
        table = np.ascontiguousarray(self.weights["positions.weight"][OPT_POSITION_OFFSET:])
        tokens = blocks.embed(self.g, ids, "embedding", self.matrices["embedding"])
        return self.g.node(
            "Add", [tokens, blocks.embed(self.g, positions, "positions", FloatMatrix(table))], ["embedded"]
        )

    def _drop_positions(self, x: str) -> str:
        # In the last layer only attention looks at other positions; what follows it is needed for one token.
        return blocks.last_position(self.g, x) if self.kind in ("fast", "prompt") else x

    def _linear(self, x: str, name: str, *, bias: bool = False, out: str = "") -> str:
        if self.taps:
            self.g.node("Identity", [x], [f"{name}.tap"])
            width = self.weights[f"{name}.weight"].shape[1]
            self.g.output(f"{name}.tap", TensorProto.FLOAT, ["batch", "sequence_length", width])
        vector = self.weights[f"{name}.bias"] if bias else None
        return blocks.linear(self.g, x, name, self.matrices[name], vector, out)

    def _attention(self, qkv: str, layer: int, rotary: tuple[str, str] | None) -> str:
        g, cfg, name = self.g, self.cfg, f"layers.{layer}"
        past, present = self.past[layer], [f"present.{layer}.key", f"present.{layer}.value"]
        attend = functools.partial(
            blocks.attention,
            g,
            qkv,
            f"{name}.attn",
            num_heads=cfg.num_heads,
            num_kv_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            rotary=rotary,
            lengths=self.lengths,
            kernel=self.attention,
        )
        if self.kv_scales is None:
            mixed = attend(past, present)
        elif self.kind == "prompt":
            exact = [f"{name}.keys", f"{name}.values"]
            mixed = attend(["", ""], exact)
            for x, of_layers, cache in zip(exact, (self.kv_scales.keys, self.kv_scales.values), present):
                blocks.store_int8(g, x, of_layers[layer], cfg.head_dim, self.unused, cache)
        else:
            scales = (
                g.constant(f"{name}.key_scales", self.kv_scales.keys[layer]),
                g.constant(f"{name}.value_scales", self.kv_scales.values[layer]),
            )
            mixed = attend(past, present, kv_scales=scales, per_channel=self.kv_scales.per_channel)
        for cache in present:
            g.output(cache, self._cache_type, ["batch", cfg.num_kv_heads, "total_length", cfg.head_dim])
        return mixed

    def _head(self, x: str) -> None:
        logits = self._linear(x, self.weights.head, out="logits")
        if self.kind == "standard":
            self.g.output(logits, TensorProto.FLOAT, ["batch", "sequence_length", self.cfg.vocab_size])
            return
        self.g.node("ArgMax", [logits], ["next_token"], axis=-1, keepdims=0)
        self.g.output("next_token", TensorProto.INT64, ["batch", 1])
        self.g.output(logits, TensorProto.FLOAT, ["batch", 1, self.cfg.vocab_size])
