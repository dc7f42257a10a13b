"""OPT: learned positions, biases, post-norm (the historical SimpleTransformerModel is this) or pre-norm.

Keys and defaults: transformers 5, `OPTConfig` and `modeling_opt.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ryot.errors import ConfigError
from ryot.models.hf_config import ACTIVATION_NAMES, ACTIVATIONS, HFConfig
from ryot.models.spec import DecoderSpec, Sizes
from ryot.models.tensors import TensorMap, stacked

#: The position table starts with two rows that no position uses.
POSITION_OFFSET = 2
#: Keys that change the computation and have one value here.
FIXED = {"layer_norm_elementwise_affine": True}


def trained_spec(sizes: Sizes) -> DecoderSpec:
    """The historical model: post-norm, exact GELU. Raises `ConfigError` for fewer kv heads than heads."""
    if sizes.num_kv_heads != sizes.num_heads:
        raise ConfigError(f"num_kv_heads: got {sizes.num_kv_heads}, expected num_heads {sizes.num_heads} (opt)")
    return DecoderSpec(
        family="opt",
        vocab_size=sizes.vocab_size,
        dim=sizes.dim,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_heads,
        head_dim=sizes.dim // sizes.num_heads,
        ff_dim=sizes.ff_dim,
        max_seq_len=sizes.max_seq_len,
        tie_embeddings=sizes.tie_embeddings,
        norm="layer",
        norm_place="post",
        norm_eps=sizes.norm_eps,
        final_norm=False,
        activation="gelu",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        ff_bias=True,
        learned_positions=True,
        position_offset=POSITION_OFFSET,
    )


def read_config(config: HFConfig) -> DecoderSpec:
    config.require(**FIXED)
    heads, dim = config.count("num_attention_heads", 12), config.integer("hidden_size", 768)
    embed_dim = config.integer("word_embed_proj_dim", dim)
    pre_norm, bias = config.flag("do_layer_norm_before", True), config.flag("enable_bias", True)
    return DecoderSpec(
        family="opt",
        vocab_size=config.integer("vocab_size", 50_272),
        dim=dim,
        num_layers=config.integer("num_hidden_layers", 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim // heads,
        ff_dim=config.integer("ffn_dim", 3072),
        max_seq_len=config.integer("max_position_embeddings", 2048),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        norm="layer",
        norm_place="pre" if pre_norm else "post",
        norm_eps=1e-5,
        final_norm=pre_norm and not config.flag("_remove_final_layer_norm", False),
        activation=config.choice("activation_function", "relu", ACTIVATIONS),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        ff_bias=bias,
        learned_positions=True,
        position_offset=POSITION_OFFSET,
        embed_dim=0 if embed_dim == dim else embed_dim,
    )


def write_config(spec: DecoderSpec) -> dict[str, object]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "max_position_embeddings": spec.max_seq_len,
        "tie_word_embeddings": spec.tie_embeddings,
        "word_embed_proj_dim": spec.table_dim,
        "ffn_dim": spec.ff_dim,
        "do_layer_norm_before": spec.norm_place == "pre",
        "activation_function": ACTIVATION_NAMES[spec.activation],
        "enable_bias": spec.qkv_bias,
        "layer_norm_elementwise_affine": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        **({"_remove_final_layer_norm": True} if spec.norm_place == "pre" and not spec.final_norm else {}),
    }


def tensor_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    root = "model.decoder"
    yield TensorMap(
        "embedding.weight", (f"{root}.embed_tokens.weight",), copy="lm_head.weight" if spec.tie_embeddings else ""
    )
    yield TensorMap("positions.weight", (f"{root}.embed_positions.weight",))
    if spec.embed_dim:
        yield TensorMap("project_in.weight", (f"{root}.project_in.weight",))
        yield TensorMap("project_out.weight", (f"{root}.project_out.weight",))
    for i in range(spec.num_layers):
        yield from _layer_maps(spec, f"layers.{i}", f"{root}.layers.{i}")
    if spec.final_norm:
        for kind in ("weight", "bias"):
            yield TensorMap(f"final_norm.{kind}", (f"{root}.final_layer_norm.{kind}",))
    if not spec.tie_embeddings:
        yield TensorMap("head.weight", ("lm_head.weight",))


def _layer_maps(spec: DecoderSpec, ours: str, theirs: str) -> Iterator[TensorMap]:
    attn = f"{theirs}.self_attn"
    for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
        yield stacked(f"{ours}.attn.qkv.{kind}", ((f"{attn}.{p}_proj.{kind}", spec.dim) for p in "qkv"))
        yield TensorMap(f"{ours}.attn.out.{kind}", (f"{attn}.out_proj.{kind}",))
        yield TensorMap(f"{ours}.up.{kind}", (f"{theirs}.fc1.{kind}",))
        yield TensorMap(f"{ours}.down.{kind}", (f"{theirs}.fc2.{kind}",))
    for kind in ("weight", "bias"):
        yield TensorMap(f"{ours}.attn_norm.{kind}", (f"{theirs}.self_attn_layer_norm.{kind}",))
        yield TensorMap(f"{ours}.ff_norm.{kind}", (f"{theirs}.final_layer_norm.{kind}",))


def unused_tensors(spec: DecoderSpec) -> tuple[str, ...]:
    return ()


def other_name(name: str) -> str:
    return name.removeprefix("model.")
