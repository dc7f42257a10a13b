"""GPT-2: learned positions, LayerNorm and biases, matrices stored [in, out] (`Conv1D`).

Keys and defaults: transformers 5, `GPT2Config` and `modeling_gpt2.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ryot.models.hf_config import ACTIVATION_NAMES, ACTIVATIONS, HFConfig
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import TensorMap

#: Keys that change the computation and have one value here.
FIXED = {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def read_config(config: HFConfig) -> DecoderSpec:
    config.require(**FIXED)
    # Sizes may also be given by the names that other families use (`attribute_map`), which then win.
    dim = config.integer("hidden_size", config.integer("n_embd", 768))
    heads = config.count("num_attention_heads", config.count("n_head", 12))
    return DecoderSpec(
        family="gpt2",
        vocab_size=config.integer("vocab_size", 50_257),
        dim=dim,
        num_layers=config.integer("num_hidden_layers", config.integer("n_layer", 12)),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim // heads,
        ff_dim=config.integer("n_inner", 4 * dim),
        max_seq_len=config.integer("max_position_embeddings", config.integer("n_positions", 1024)),
        tie_embeddings=config.flag("tie_word_embeddings", True),
        norm="layer",
        norm_place="pre",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=config.choice("activation_function", "gelu_new", ACTIVATIONS),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        ff_bias=True,
        learned_positions=True,
        attention_scale=0.0 if config.flag("scale_attn_weights", True) else 1.0,
    )


def write_config(spec: DecoderSpec) -> dict[str, object]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab_size,
        "n_embd": spec.dim,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_inner": spec.ff_dim,
        "n_positions": spec.max_seq_len,
        "tie_word_embeddings": spec.tie_embeddings,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": ACTIVATION_NAMES[spec.activation],
        "scale_attn_weights": spec.attention_scale == 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def tensor_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    root = "transformer"
    yield TensorMap("embedding.weight", (f"{root}.wte.weight",), copy="lm_head.weight" if spec.tie_embeddings else "")
    yield TensorMap("positions.weight", (f"{root}.wpe.weight",))
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"{root}.h.{i}"
        for name, stored in (
            ("attn.qkv", "attn.c_attn"),
            ("attn.out", "attn.c_proj"),
            ("up", "mlp.c_fc"),
            ("down", "mlp.c_proj"),
        ):
            yield TensorMap(f"{ours}.{name}.weight", (f"{theirs}.{stored}.weight",), layout="transposed")
            yield TensorMap(f"{ours}.{name}.bias", (f"{theirs}.{stored}.bias",))
        for kind in ("weight", "bias"):
            yield TensorMap(f"{ours}.attn_norm.{kind}", (f"{theirs}.ln_1.{kind}",))
            yield TensorMap(f"{ours}.ff_norm.{kind}", (f"{theirs}.ln_2.{kind}",))
    for kind in ("weight", "bias"):
        yield TensorMap(f"final_norm.{kind}", (f"{root}.ln_f.{kind}",))
    if not spec.tie_embeddings:
        yield TensorMap("head.weight", ("lm_head.weight",))


def unused_tensors(spec: DecoderSpec) -> tuple[str, ...]:
    # Old files carry the causal mask and what it writes.
    return tuple(f"transformer.h.{i}.attn.{name}" for i in range(spec.num_layers) for name in ("bias", "masked_bias"))


def other_name(name: str) -> str:
    # The first GPT-2 files are the bare model's.
    return name.removeprefix("transformer.")
