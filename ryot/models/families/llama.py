"""Llama, and what has its shape: SmolLM2, TinyLlama, fine-tunes of them.

Keys and defaults: transformers 5, `LlamaConfig` and `modeling_llama.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ryot.models.hf_config import ACTIVATION_NAMES, ACTIVATIONS, HFConfig
from ryot.models.rotary import Rotary, read_rotary, write_rotary
from ryot.models.spec import DecoderSpec, Sizes
from ryot.models.tensors import TensorMap, stacked


def trained_spec(sizes: Sizes) -> DecoderSpec:
    head_dim = sizes.dim // sizes.num_heads
    return DecoderSpec(
        family="llama",
        vocab_size=sizes.vocab_size,
        dim=sizes.dim,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=head_dim,
        ff_dim=sizes.ff_dim,
        max_seq_len=sizes.max_seq_len,
        tie_embeddings=sizes.tie_embeddings,
        norm="rms",
        norm_place="pre",
        norm_eps=sizes.norm_eps,
        activation="silu",
        gated=True,
        rotaries=(Rotary(theta=sizes.rope_theta, dim=head_dim),),
    )


def read_config(config: HFConfig) -> DecoderSpec:
    heads, dim = config.integer("num_attention_heads", 32), config.integer("hidden_size", 4096)
    head_dim = config.integer("head_dim", dim // heads)
    bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    return DecoderSpec(
        family="llama",
        vocab_size=config.integer("vocab_size", 32_000),
        dim=dim,
        num_layers=config.integer("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        ff_dim=config.integer("intermediate_size", 11_008),
        max_seq_len=config.integer("max_position_embeddings", 2048),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        norm="rms",
        norm_place="pre",
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=config.choice("hidden_act", "silu", ACTIVATIONS),
        gated=True,
        qkv_bias=bias,
        out_bias=bias,
        ff_bias=mlp_bias,
        rotaries=(read_rotary(config, head_dim),),
    )


def write_config(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ff_dim,
        "max_position_embeddings": spec.max_seq_len,
        "tie_word_embeddings": spec.tie_embeddings,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": ACTIVATION_NAMES[spec.activation],
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.ff_bias,
        **write_rotary(spec.rotaries[0], spec.head_dim),
    }


def tensor_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    yield TensorMap("embedding.weight", ("model.embed_tokens.weight",))
    for i in range(spec.num_layers):
        yield from layer_maps(spec, f"layers.{i}", f"model.layers.{i}")
    yield TensorMap("final_norm.weight", ("model.norm.weight",))
    if not spec.tie_embeddings:
        yield TensorMap("head.weight", ("lm_head.weight",))


def layer_maps(spec: DecoderSpec, ours: str, theirs: str) -> Iterator[TensorMap]:
    """One layer's arrays where query, key, value, gate and up are matrices of their own."""
    attn, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    parts = tuple(zip("qkv", (spec.q_dim, spec.kv_dim, spec.kv_dim)))
    for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
        yield stacked(f"{ours}.attn.qkv.{kind}", ((f"{attn}.{p}_proj.{kind}", rows) for p, rows in parts))
    for kind in ("weight", "bias") if spec.out_bias else ("weight",):
        yield TensorMap(f"{ours}.attn.out.{kind}", (f"{attn}.o_proj.{kind}",))
    for kind in ("weight", "bias") if spec.ff_bias else ("weight",):
        yield stacked(f"{ours}.gate_up.{kind}", ((f"{mlp}.{p}_proj.{kind}", spec.ff_dim) for p in ("gate", "up")))
        yield TensorMap(f"{ours}.down.{kind}", (f"{mlp}.down_proj.{kind}",))
    if spec.qk_norm != "none":
        yield TensorMap(f"{ours}.attn.q_norm.weight", (f"{attn}.q_norm.weight",))
        yield TensorMap(f"{ours}.attn.k_norm.weight", (f"{attn}.k_norm.weight",))
    yield TensorMap(f"{ours}.attn_norm.weight", (f"{theirs}.input_layernorm.weight",))
    yield TensorMap(f"{ours}.ff_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))


def unused_tensors(spec: DecoderSpec) -> tuple[str, ...]:
    # Old files carry the frequencies; a tied head may be stored although it is the embedding.
    frequencies = tuple(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(spec.num_layers))
    return (*frequencies, "lm_head.weight") if spec.tie_embeddings else frequencies
