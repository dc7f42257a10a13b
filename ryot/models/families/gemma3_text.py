"""Gemma 3's text models (270M, 1B): norms around each branch, local layers with a window and rotary base of their own.

Keys and defaults: transformers 5, `Gemma3TextConfig` and `modeling_gemma3.py`. There the embedding's multiplier is
rounded to the type that the model runs in; here it runs in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from ryot.errors import CheckpointError
from ryot.models.families import llama
from ryot.models.hf_config import ACTIVATION_NAMES, ACTIVATIONS, HFConfig
from ryot.models.layer_types import FULL, SLIDING, read_layer_types, read_windows, write_windows
from ryot.models.rotary import Rotary, build_rotary, scaling_table
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import TensorMap

#: `model_type` of checkpoints that hold such a text model and an encoder of images.
WRAPPED_IN = ("gemma3",)
#: Base of the rotary frequencies of the layers of each type; `rotaries` has them in this order.
THETAS = {FULL: 1_000_000.0, SLIDING: 10_000.0}
DEFAULTS = llama.Defaults(
    vocab_size=262_208,
    dim=2304,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    ff_dim=9216,
    max_seq_len=131_072,
    tie_embeddings=True,
)
#: Keys that change the computation and have one value here.
FIXED = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
}

unused_tensors, other_name = llama.unused_tensors, llama.other_name


def read_config(config: HFConfig) -> DecoderSpec:
    config.require(**FIXED)
    head_dim = config.integer("head_dim", DEFAULTS.head_dim or 0)
    rotaries = _read_rotaries(config, head_dim)
    spec = llama.read_shape(config, "gemma3_text", DEFAULTS, rotaries[0])
    pattern = config.count("sliding_window_pattern", 6)
    types = read_layer_types(config, [SLIDING if (i + 1) % pattern else FULL for i in range(spec.num_layers)])
    bias = config.flag("attention_bias", False)
    return dataclasses.replace(
        spec,
        norm_place="sandwich",
        qk_norm="head",
        activation=config.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS),
        qkv_bias=bias,
        out_bias=bias,
        rotaries=rotaries,
        layer_rotaries=tuple(list(THETAS).index(name) for name in types),
        layer_windows=read_windows(config, types, config.optional_count("sliding_window", 4096)),
        embedding_multiplier=math.sqrt(spec.dim),
        attention_scale=config.positive("query_pre_attn_scalar", 256) ** -0.5,
    )


def _read_rotaries(config: HFConfig, head_dim: int) -> tuple[Rotary, ...]:
    """`rope_parameters` by type of layer, or the older keys, where `rope_scaling` is of the full layers alone."""
    tables = config.table("rope_parameters") or {}
    if others := sorted(set(tables) - set(THETAS)):
        raise CheckpointError(f"{config.where}: rope_parameters has {others[0]!r}, expected {' and '.join(THETAS)}")
    older = {
        FULL: {"rope_theta": config.number("rope_theta", THETAS[FULL])},
        SLIDING: {"rope_theta": config.number("rope_local_base_freq", THETAS[SLIDING])},
    }
    values = {name: older[name] | (tables.get(name) or {}) for name in THETAS}
    values[FULL] |= config.table("rope_scaling") or {}
    rotaries = tuple(build_rotary(table, config, head_dim) for table in values.values())
    if any(rotary.dim != head_dim or rotary.scaling == "longrope" for rotary in rotaries):
        raise CheckpointError(
            f"{config.where}: rope_parameters has longrope or partial_rotary_factor, expected neither"
        )
    return rotaries


def write_config(spec: DecoderSpec) -> dict[str, object]:
    shape = llama.write_shape(spec, "Gemma3ForCausalLM")
    tables = [{"rope_theta": rotary.theta, **scaling_table(rotary)} for rotary in spec.rotaries]
    for key in ("hidden_act", "rope_theta", "rope_scaling"):
        shape.pop(key, None)
    return shape | {
        "hidden_activation": ACTIVATION_NAMES[spec.activation],
        "attention_bias": spec.qkv_bias,
        "query_pre_attn_scalar": round(spec.scale**-2),
        "rope_parameters": dict(zip(THETAS, tables)),
        **write_windows(spec),
    }


def tensor_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    for entry in _tensor_maps(spec):
        # Norms are stored as the difference from 1.
        yield dataclasses.replace(entry, layout="plus_one") if "norm." in entry.name else entry


def _tensor_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    yield from llama.table_maps(spec)
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield from llama.matrix_maps(spec, ours, theirs)
        yield from llama.qk_norm_maps(spec, ours, theirs)
        yield TensorMap(f"{ours}.attn_norm.weight", (f"{theirs}.input_layernorm.weight",))
        yield TensorMap(f"{ours}.attn_post_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))
        yield TensorMap(f"{ours}.ff_norm.weight", (f"{theirs}.pre_feedforward_layernorm.weight",))
        yield TensorMap(f"{ours}.ff_post_norm.weight", (f"{theirs}.post_feedforward_layernorm.weight",))
