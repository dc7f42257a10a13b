"""Phi-3, Phi-3.5 and Phi-4-mini: Llama's shape with packed matrices, partly rotated heads and LongRoPE.

Keys and defaults: transformers 5, `Phi3Config` and `modeling_phi3.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ryot.errors import CheckpointError
from ryot.models.families import llama
from ryot.models.hf_config import HFConfig
from ryot.models.layer_types import SLIDING, read_windows
from ryot.models.rotary import Rotary, build_rotary, rope_table
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import TensorMap

DEFAULTS = llama.Defaults(vocab_size=32_064, dim=3072, ff_dim=8192, max_seq_len=4096, norm_eps=1e-5)
ORIGINAL_LENGTH = 4096
#: LongRoPE by its old names.
_OLD_SCALINGS = ("su", "yarn")

unused_tensors, other_name = llama.unused_tensors, llama.other_name


def read_config(config: HFConfig) -> DecoderSpec:
    heads = config.count("num_attention_heads", DEFAULTS.num_heads)
    head_dim = config.integer("head_dim", config.integer("hidden_size", DEFAULTS.dim) // heads)
    spec = llama.read_shape(config, "phi3", DEFAULTS, _read_rotary(config, head_dim))
    window = config.optional_count("sliding_window", None)
    types = [] if window is None else [SLIDING] * spec.num_layers
    return dataclasses.replace(spec, layer_windows=read_windows(config, types, window))


def _read_rotary(config: HFConfig, head_dim: int) -> Rotary:
    table = rope_table(config, {"rope_theta": DEFAULTS.rope_theta, "partial_rotary_factor": 1.0})
    scaling = table.pop("type", "default")
    scaling = table.setdefault("rope_type", scaling)
    if scaling in _OLD_SCALINGS:
        table["rope_type"] = "longrope"
    elif scaling not in ("default", "longrope"):
        raise CheckpointError(f"{config.where}: rope_type is {scaling!r}, expected default or longrope (phi3)")
    return build_rotary(table, config, head_dim, original_length=ORIGINAL_LENGTH)


def write_config(spec: DecoderSpec) -> dict[str, object]:
    return llama.write_shape(spec, "Phi3ForCausalLM") | {
        "original_max_position_embeddings": spec.rotaries[0].original_max_seq_len or spec.max_seq_len,
        "sliding_window": max(spec.layer_windows, default=None),
        # The class's own is 32000, which a small vocabulary does not have.
        "pad_token_id": None,
    }


def tensor_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    yield from llama.table_maps(spec)
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield TensorMap(f"{ours}.attn.qkv.weight", (f"{theirs}.self_attn.qkv_proj.weight",))
        yield TensorMap(f"{ours}.attn.out.weight", (f"{theirs}.self_attn.o_proj.weight",))
        yield TensorMap(f"{ours}.gate_up.weight", (f"{theirs}.mlp.gate_up_proj.weight",))
        yield TensorMap(f"{ours}.down.weight", (f"{theirs}.mlp.down_proj.weight",))
        yield TensorMap(f"{ours}.attn_norm.weight", (f"{theirs}.input_layernorm.weight",))
        yield TensorMap(f"{ours}.ff_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))
