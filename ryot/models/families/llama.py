"""Llama, and what has its shape: SmolLM2, TinyLlama, fine-tunes of them.

Keys and defaults: transformers 5, `LlamaConfig` and `modeling_llama.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a family of this shape takes for a missing key; Llama's own where it says nothing else."""

    vocab_size: int = 32_000
    dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    """None: as many as `num_heads`."""
    head_dim: int | None = None
    """None: `dim // num_heads`."""
    ff_dim: int = 11_008
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0


def read_config(config: HFConfig) -> DecoderSpec:
    return read_biases(config, read_shape(config, "llama", Defaults()))


def read_shape(config: HFConfig, family: str, defaults: Defaults, rotary: Rotary | None = None) -> DecoderSpec:
    """A pre-norm decoder with RMSNorm, a gated feed-forward layer and rotary positions, without biases.

    `head_dim` is read also where the family's config class has no such field: its attention asks for the attribute.
    """
    heads = config.count("num_attention_heads", defaults.num_heads)
    dim = config.integer("hidden_size", defaults.dim)
    head_dim = config.integer("head_dim", defaults.head_dim or dim // heads)
    rotary = rotary or read_rotary(config, head_dim, theta=defaults.rope_theta)
    context = config.integer("max_position_embeddings", defaults.max_seq_len)
    return DecoderSpec(
        family=family,
        vocab_size=config.integer("vocab_size", defaults.vocab_size),
        dim=dim,
        num_layers=config.integer("num_hidden_layers", defaults.num_layers),
        num_heads=heads,
        num_kv_heads=config.optional_count("num_key_value_heads", defaults.num_kv_heads) or heads,
        head_dim=head_dim,
        ff_dim=config.integer("intermediate_size", defaults.ff_dim),
        max_seq_len=min(context, rotary.original_max_seq_len) if rotary.scaling == "longrope" else context,
        tie_embeddings=config.flag("tie_word_embeddings", defaults.tie_embeddings),
        norm="rms",
        norm_place="pre",
        norm_eps=config.number("rms_norm_eps", defaults.norm_eps),
        activation=config.choice("hidden_act", "silu", ACTIVATIONS),
        gated=True,
        rotaries=(rotary,),
    )


def read_biases(config: HFConfig, spec: DecoderSpec) -> DecoderSpec:
    """The decoder with the biases that `attention_bias` and `mlp_bias` say."""
    bias = config.flag("attention_bias", False)
    return dataclasses.replace(spec, qkv_bias=bias, out_bias=bias, ff_bias=config.flag("mlp_bias", False))


def write_config(spec: DecoderSpec) -> dict[str, object]:
    return write_shape(spec, "LlamaForCausalLM") | write_biases(spec)


def write_shape(spec: DecoderSpec, architecture: str) -> dict[str, object]:
    """The keys that `read_shape` reads."""
    return {
        "architectures": [architecture],
        "model_type": spec.family,
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
        **write_rotary(spec.rotaries[0], spec.head_dim),
    }


def write_biases(spec: DecoderSpec) -> dict[str, object]:
    return {"attention_bias": spec.qkv_bias, "mlp_bias": spec.ff_bias}


def tensor_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    yield from table_maps(spec)
    for i in range(spec.num_layers):
        yield from layer_maps(spec, f"layers.{i}", f"model.layers.{i}")


def table_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    """What stands before and behind the layers."""
    yield TensorMap(
        "embedding.weight", ("model.embed_tokens.weight",), copy="lm_head.weight" if spec.tie_embeddings else ""
    )
    yield TensorMap("final_norm.weight", ("model.norm.weight",))
    if not spec.tie_embeddings:
        yield TensorMap("head.weight", ("lm_head.weight",))


def layer_maps(spec: DecoderSpec, ours: str, theirs: str) -> Iterator[TensorMap]:
    """One layer's arrays."""
    yield from matrix_maps(spec, ours, theirs)
    yield from qk_norm_maps(spec, ours, theirs)
    yield TensorMap(f"{ours}.attn_norm.weight", (f"{theirs}.input_layernorm.weight",))
    yield TensorMap(f"{ours}.ff_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))


def matrix_maps(spec: DecoderSpec, ours: str, theirs: str) -> Iterator[TensorMap]:
    """One layer's matrices and biases where query, key, value, gate and up are matrices of their own."""
    attn, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    parts = tuple(zip("qkv", (spec.q_dim, spec.kv_dim, spec.kv_dim)))
    for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
        yield stacked(f"{ours}.attn.qkv.{kind}", ((f"{attn}.{p}_proj.{kind}", rows) for p, rows in parts))
    for kind in ("weight", "bias") if spec.out_bias else ("weight",):
        yield TensorMap(f"{ours}.attn.out.{kind}", (f"{attn}.o_proj.{kind}",))
    for kind in ("weight", "bias") if spec.ff_bias else ("weight",):
        yield stacked(f"{ours}.gate_up.{kind}", ((f"{mlp}.{p}_proj.{kind}", spec.ff_dim) for p in ("gate", "up")))
        yield TensorMap(f"{ours}.down.{kind}", (f"{mlp}.down_proj.{kind}",))


def qk_norm_maps(spec: DecoderSpec, ours: str, theirs: str) -> Iterator[TensorMap]:
    for x in "qk" if spec.qk_norm != "none" else "":
        yield TensorMap(f"{ours}.attn.{x}_norm.weight", (f"{theirs}.self_attn.{x}_norm.weight",))


def unused_tensors(spec: DecoderSpec) -> tuple[str, ...]:
    # Old files carry the frequencies.
    return tuple(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(spec.num_layers))


def other_name(name: str) -> str:
    return name.removeprefix("model.")
