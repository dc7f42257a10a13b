"""GPT-NeoX and Pythia: parallel branches, partly rotated heads; query, key and value packed by head.

Keys and defaults: transformers 5, `GPTNeoXConfig` and `modeling_gpt_neox.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ryot.models.hf_config import ACTIVATION_NAMES, ACTIVATIONS, HFConfig
from ryot.models.rotary import Rotary, build_rotary, rope_table, rotary_fraction, scaling_table
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import TensorMap


def read_config(config: HFConfig) -> DecoderSpec:
    heads, dim = config.count("num_attention_heads", 64), config.integer("hidden_size", 6144)
    head_dim = dim // heads
    # No field of the class, but the rotary positions would ask for the attribute.
    config.require(head_dim=head_dim)
    bias = config.flag("attention_bias", True)
    rotary = _read_rotary(config, head_dim)
    context = config.integer("max_position_embeddings", 2048)
    return DecoderSpec(
        family="gpt_neox",
        vocab_size=config.integer("vocab_size", 50_432),
        dim=dim,
        num_layers=config.integer("num_hidden_layers", 44),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        ff_dim=config.integer("intermediate_size", 24_576),
        max_seq_len=min(context, rotary.original_max_seq_len) if rotary.scaling == "longrope" else context,
        tie_embeddings=config.flag("tie_word_embeddings", False),
        norm="layer",
        norm_place="pre",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        activation=config.choice("hidden_act", "gelu", ACTIVATIONS),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        ff_bias=True,
        rotaries=(rotary,),
        parallel_residual=config.flag("use_parallel_residual", True),
    )


def _read_rotary(config: HFConfig, head_dim: int) -> Rotary:
    table = rope_table(config, {"rotary_emb_base": 10_000.0, "rotary_pct": 0.25})
    values = {"rope_theta": table.pop("rotary_emb_base"), "partial_rotary_factor": table.pop("rotary_pct")}
    return build_rotary(values | table, config, head_dim)


def write_config(spec: DecoderSpec) -> dict[str, object]:
    (rotary,) = spec.rotaries
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.ff_dim,
        "max_position_embeddings": spec.max_seq_len,
        "tie_word_embeddings": spec.tie_embeddings,
        "layer_norm_eps": spec.norm_eps,
        "hidden_act": ACTIVATION_NAMES[spec.activation],
        "attention_bias": spec.qkv_bias,
        "use_parallel_residual": spec.parallel_residual,
        "rotary_emb_base": rotary.theta,
        "rotary_pct": rotary_fraction(rotary, spec.head_dim),
        "rope_scaling": None if rotary.scaling == "default" else scaling_table(rotary),
    }


def tensor_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    root, head = "gpt_neox", "embed_out.weight"
    yield TensorMap("embedding.weight", (f"{root}.embed_in.weight",), copy=head if spec.tie_embeddings else "")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"{root}.layers.{i}"
        for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
            packed = f"{theirs}.attention.query_key_value.{kind}"
            yield TensorMap(f"{ours}.attn.qkv.{kind}", (packed,), layout="heads")
            yield TensorMap(f"{ours}.attn.out.{kind}", (f"{theirs}.attention.dense.{kind}",))
        for kind in ("weight", "bias"):
            yield TensorMap(f"{ours}.up.{kind}", (f"{theirs}.mlp.dense_h_to_4h.{kind}",))
            yield TensorMap(f"{ours}.down.{kind}", (f"{theirs}.mlp.dense_4h_to_h.{kind}",))
            yield TensorMap(f"{ours}.attn_norm.{kind}", (f"{theirs}.input_layernorm.{kind}",))
            yield TensorMap(f"{ours}.ff_norm.{kind}", (f"{theirs}.post_attention_layernorm.{kind}",))
    for kind in ("weight", "bias"):
        yield TensorMap(f"final_norm.{kind}", (f"{root}.final_layer_norm.{kind}",))
    if not spec.tie_embeddings:
        yield TensorMap("head.weight", (head,))


def unused_tensors(spec: DecoderSpec) -> tuple[str, ...]:
    # Old files carry the causal mask, what it writes and the frequencies.
    names = ("bias", "masked_bias", "rotary_emb.inv_freq")
    return tuple(f"gpt_neox.layers.{i}.attention.{name}" for i in range(spec.num_layers) for name in names)


def other_name(name: str) -> str:
    return "lm_head.weight" if name == "embed_out.weight" else name.removeprefix("gpt_neox.")
