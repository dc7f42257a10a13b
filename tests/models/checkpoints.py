"""Tiny random checkpoints as transformers saves them, of every family and every switch that changes what is computed.

`CHECKPOINTS` maps a name to a maker of the folder; the name starts with the family's. Weights are large enough, and
norms and biases far enough from 1 and 0, that leaving out any part of a model changes its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 272
CONTEXT = 96
END = "<|endoftext|>"
_TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": None}
_SHAPE = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_OPT = {
    **_TOKENS,
    "pad_token_id": 1,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GPT2 = {**_TOKENS, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
_NEOX = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}
_NEOX |= {"hidden_size": 128, "num_attention_heads": 2}
_GEMMA = {**_SHAPE, "head_dim": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 4, "pad_token_id": 0}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **values}}


_LLAMA3 = _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=24)
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [2.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0],
}
_NESTED_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
}

#: Class names of transformers and the config of each checkpoint.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {}


def _add(family: str, config: str, model: str, base: dict[str, Any], **variants: dict[str, Any]) -> None:
    for name, changes in variants.items():
        _MODELS[family if name == "plain" else f"{family}_{name}"] = config, model, base | changes


_add(
    "llama",
    "LlamaConfig",
    "LlamaForCausalLM",
    _SHAPE,
    plain={},
    head_dim={"head_dim": 32, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    biases={"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.1},
    linear=_rope("linear", factor=2.0),
    dynamic=_rope("dynamic", factor=2.0),
    llama3=_LLAMA3,
    yarn=_YARN,
    yarn_all=_rope(
        "yarn",
        factor=3.0,
        original_max_position_embeddings=32,
        beta_fast=8.0,
        beta_slow=2.0,
        mscale=1.5,
        mscale_all_dim=0.7,
        truncate=False,
    ),
    yarn_factor=_rope("yarn", factor=3.0, original_max_position_embeddings=32, attention_factor=0.8),
    longrope={"rope_parameters": _LONG | {"factor": 4.0, "original_max_position_embeddings": 48}},
)
_add(
    "mistral",
    "MistralConfig",
    "MistralForCausalLM",
    _SHAPE,
    plain={"sliding_window": None},
    window={"sliding_window": 9, "head_dim": 32},
)
_add(
    "qwen2",
    "Qwen2Config",
    "Qwen2ForCausalLM",
    _SHAPE,
    plain={"tie_word_embeddings": True},
    upper_windows={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    layer_types={
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    yarn=_YARN,
)
_add(
    "qwen3",
    "Qwen3Config",
    "Qwen3ForCausalLM",
    _SHAPE | {"head_dim": 32},
    plain={"tie_word_embeddings": True},
    biases={"attention_bias": True, "num_key_value_heads": 4},
    windows={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
)
_add(
    "gemma3_text",
    "Gemma3TextConfig",
    "Gemma3ForCausalLM",
    _GEMMA,
    plain={"sliding_window": 8, "num_hidden_layers": 6},
    pattern={"sliding_window": 8, "sliding_window_pattern": 2, "attention_bias": True},
    nested_rope={
        "sliding_window": 8,
        "rope_parameters": _NESTED_ROPE,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    untied={"sliding_window": 8, "sliding_window_pattern": 3, "tie_word_embeddings": False, "head_dim": 32},
)
_add(
    "gpt2",
    "GPT2Config",
    "GPT2LMHeadModel",
    _GPT2,
    plain={},
    inner={"n_inner": 96, "activation_function": "relu", "layer_norm_epsilon": 0.1},
    untied={"tie_word_embeddings": False, "scale_attn_weights": False},
)
_add(
    "gpt_neox",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    _NEOX,
    plain={},
    sequential={"use_parallel_residual": False, "rotary_pct": 0.5, "tie_word_embeddings": True},
    whole_heads={"attention_bias": False, "rotary_pct": 1.0, "rotary_emb_base": 500, "hidden_act": "gelu_new"},
    linear={"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
)
_add(
    "phi3",
    "Phi3Config",
    "Phi3ForCausalLM",
    _SHAPE,
    plain={"sliding_window": 9},
    partial={"head_dim": 32, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    longrope={"original_max_position_embeddings": 48, "rope_parameters": _LONG},
)
_add(
    "granite",
    "GraniteConfig",
    "GraniteForCausalLM",
    _SHAPE,
    plain={},
    multipliers={
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.13,
        "logits_scaling": 7.0,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
)
_add(
    "olmo2",
    "Olmo2Config",
    "Olmo2ForCausalLM",
    _SHAPE,
    plain={},
    biases={"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
)
_add(
    "smollm3",
    "SmolLM3Config",
    "SmolLM3ForCausalLM",
    _SHAPE,
    plain={"no_rope_layer_interval": 2},
    flags={"no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    windows={"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9},
)
_add(
    "opt",
    "OPTConfig",
    "OPTForCausalLM",
    _OPT,
    plain={},
    post_norm_projected={"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    projected_untied={"word_embed_proj_dim": 32, "tie_word_embeddings": False, "activation_function": "gelu"},
    no_bias={"enable_bias": False, "activation_function": "gelu_new"},
    no_final_norm={"_remove_final_layer_norm": True},
)


def build_config(name: str) -> PreTrainedConfig:
    """The config of a checkpoint, as transformers' class makes it."""
    config, _, values = _MODELS[name]
    made: PreTrainedConfig = getattr(transformers, config)(**values)
    return made


def build_model(config: PreTrainedConfig, model: str) -> PreTrainedModel:
    """A model with random weights of which none hides another."""
    torch.manual_seed(0)
    built: PreTrainedModel = getattr(transformers, model)(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name or ".ln_" in name:
                # Multiples of 1/1024: 1 plus Gemma's is exact in float32.
                centre = 0 if "Gemma" in model or name.endswith("bias") else 1
                parameter.copy_(centre + torch.randint(-700, 701, parameter.shape) / 1024)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.5)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.normal_(std=0.7)
            else:
                parameter.normal_(std=1.6 * parameter.shape[1] ** -0.5)
    return built


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and the end of a text."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint `name` to `folder`: config, weights and tokenizer."""
    _, model, _ = _MODELS[name]
    build_model(build_config(name), model).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {name: partial(make, name) for name in _MODELS}
