"""The boundary to Hugging Face's checkpoint layout: names, config keys and packed matrices, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ryot.config import ModelConfig, build_from_mapping
from ryot.errors import CheckpointError, ConfigError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """`config.json` that transformers loads the same model from."""
    common = {
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "dtype": "float32",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "max_position_embeddings": cfg.max_seq_len,
        "tie_word_embeddings": cfg.tie_embeddings,
    }
    if cfg.architecture == "llama":
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": cfg.num_kv_heads,
            "head_dim": cfg.head_dim,
            "intermediate_size": cfg.ff_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rms_norm_eps": cfg.norm_eps,
            "rope_theta": cfg.rope_theta,
        }
    return common | {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "word_embed_proj_dim": cfg.dim,
        "ffn_dim": cfg.ff_dim,
        "do_layer_norm_before": False,
        "activation_function": "gelu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
    }


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape that a `config.json` describes. Raises `CheckpointError` for what this project cannot run."""
    kind = values.get("model_type")
    if kind not in ("llama", "opt"):
        raise CheckpointError(f"{where}: model_type is {kind!r}, expected 'llama' or 'opt'")
    fixed: dict[str, tuple[Any, ...]] = {
        "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
        "opt": {
            "do_layer_norm_before": (False,),
            "activation_function": ("gelu",),
            "word_embed_proj_dim": (values.get("hidden_size"),),
        },
    }[kind]
    for key, allowed in fixed.items():
        if values.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"{where}: {key} is {values[key]!r}, expected {allowed[0]!r}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"{where}: rope_type is {rope!r}, expected plain rotary positions")
    try:
        return build_from_mapping(
            ModelConfig,
            {
                "architecture": kind,
                "vocab_size": values["vocab_size"],
                "dim": values["hidden_size"],
                "num_layers": values["num_hidden_layers"],
                "num_heads": values["num_attention_heads"],
                "num_kv_heads": values.get("num_key_value_heads", values["num_attention_heads"]),
                "ff_dim": values["intermediate_size" if kind == "llama" else "ffn_dim"],
                "max_seq_len": values["max_position_embeddings"],
                "tie_embeddings": values.get("tie_word_embeddings", kind == "opt"),
                "rope_theta": float(values.get("rope_theta", rope.get("rope_theta", 10_000.0))),
                "norm_eps": float(values.get("rms_norm_eps", 1e-5)),
            },
            where,
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: {error.args[0]} is missing") from error
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _names(cfg: ModelConfig) -> Iterator[tuple[str, tuple[tuple[str, int], ...]]]:
    """Each parameter of `Decoder` with the Hugging Face tensors (name, rows) that it holds one below the other.

    Rows of 0 mean the whole tensor.
    """
    D, KV, F = cfg.dim, cfg.kv_dim, cfg.ff_dim
    llama = cfg.architecture == "llama"
    root = "model" if llama else "model.decoder"
    yield "embedding.weight", ((f"{root}.embed_tokens.weight", 0),)
    if not llama:
        yield "positions.weight", ((f"{root}.embed_positions.weight", 0),)
    kinds = ("weight",) if llama else ("weight", "bias")
    for i in range(cfg.num_layers):
        ours, theirs = f"layers.{i}", f"{root}.layers.{i}"
        attn = f"{theirs}.self_attn"
        for kind in kinds:
            yield f"{ours}.attn.qkv.{kind}", tuple((f"{attn}.{p}_proj.{kind}", n) for p, n in zip("qkv", (D, KV, KV)))
            if llama:
                yield f"{ours}.attn.out.{kind}", ((f"{attn}.o_proj.{kind}", 0),)
                mlp = f"{theirs}.mlp"
                yield f"{ours}.gate_up.{kind}", ((f"{mlp}.gate_proj.{kind}", F), (f"{mlp}.up_proj.{kind}", F))
                yield f"{ours}.down.{kind}", ((f"{mlp}.down_proj.{kind}", 0),)
                yield f"{ours}.attn_norm.{kind}", ((f"{theirs}.input_layernorm.{kind}", 0),)
                yield f"{ours}.ff_norm.{kind}", ((f"{theirs}.post_attention_layernorm.{kind}", 0),)
            else:
                yield f"{ours}.attn.out.{kind}", ((f"{attn}.out_proj.{kind}", 0),)
                yield f"{ours}.up.{kind}", ((f"{theirs}.fc1.{kind}", 0),)
                yield f"{ours}.down.{kind}", ((f"{theirs}.fc2.{kind}", 0),)
                yield f"{ours}.attn_norm.{kind}", ((f"{theirs}.self_attn_layer_norm.{kind}", 0),)
                yield f"{ours}.ff_norm.{kind}", ((f"{theirs}.final_layer_norm.{kind}", 0),)
    if llama:
        yield "final_norm.weight", (("model.norm.weight", 0),)
    if not cfg.tie_embeddings:
        yield "head.weight", (("lm_head.weight", 0),)


def state_to_hf(cfg: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`Decoder.state_dict()` under Hugging Face's names, packed matrices taken apart; a tied head is left out."""
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _names(cfg):
        if len(theirs) == 1:
            tensors[theirs[0][0]] = state[ours].contiguous()
        else:
            parts = state[ours].split([rows for _, rows in theirs])
            tensors |= {name: part.contiguous() for (name, _), part in zip(theirs, parts)}
    return tensors


def state_from_hf(cfg: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """`Decoder.state_dict()` from tensors under Hugging Face's names.

    Raises `CheckpointError` for a tensor that is missing or not known.
    """
    wanted = dict(_names(cfg))
    known = {name for parts in wanted.values() for name, _ in parts}
    if extra := sorted(set(tensors) - known - {"lm_head.weight"}):
        raise CheckpointError(f"{where}: tensor {extra[0]} is not part of a {cfg.architecture} model")
    if missing := sorted(known - set(tensors)):
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing")
    return {ours: torch.cat([tensors[name] for name, _ in parts]) for ours, parts in wanted.items()}
