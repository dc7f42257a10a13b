"""config.json from GGUF's metadata, and the metadata from config.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ryot.errors import CheckpointError, ExportError
from ryot.models.sources.checkpoint import Json
from ryot.models.sources.gguf_families import FAMILIES, Family
from ryot.models.sources.gguf_file import GgufFile, Value
from ryot.models.sources.gguf_rope import metadata_from_rope, rope_from_metadata

logger = logging.getLogger(__name__)

#: Hugging Face's key -> GGUF's, which stands below the architecture's name.
_LLAMA_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_KEYS = {
    "gpt2": {
        "n_embd": "embedding_length",
        "n_layer": "block_count",
        "n_inner": "feed_forward_length",
        "n_head": "attention.head_count",
        "n_positions": "context_length",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
    },
    "gptneox": {
        **{key: name for key, name in _LLAMA_KEYS.items() if key != "rms_norm_eps"},
        "layer_norm_eps": "attention.layer_norm_epsilon",
        "use_parallel_residual": "use_parallel_residual",
    },
}
_GRANITE_SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
#: llama.cpp's own: Gemma 3 has full attention in every sixth layer, SmolLM3 no positions in every fourth.
_GEMMA3_PATTERN = 6
_SMOLLM3_INTERVAL = 4
#: Gemma 3 27B alone scales its scores by the model's width over its heads (llama.cpp knows it by its layers too).
_GEMMA3_27B_LAYERS = 62


def find_family(file: GgufFile) -> Family:
    """The family of a GGUF file. Raises `CheckpointError` for an architecture that is not read."""
    name = file.metadata.get("general.architecture")
    for family in FAMILIES:
        if family.gguf == name:
            return family
    known = ", ".join(sorted({family.gguf for family in FAMILIES}))
    raise CheckpointError(f"checkpoint {file.path}: architecture {name}, expected one of {known}")


def config_from_metadata(file: GgufFile, family: Family) -> dict[str, Json]:
    """config.json of a GGUF file. Raises `CheckpointError` naming the key that is missing or of an unknown kind."""
    arch = family.gguf
    config: dict[str, Json] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key, name in _KEYS.get(arch, _LLAMA_KEYS).items():
        config[key] = _scalar(file, f"{arch}.{name}", True if name == "use_parallel_residual" else None)
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"checkpoint {file.path}: token_embd.weight is missing (a vocabulary without a model?)")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if arch == "gpt2":
        return {**config, "activation_function": "gelu_new"}
    heads = int(_scalar(file, f"{arch}.attention.head_count"))
    head_dim = int(
        _scalar(file, f"{arch}.attention.key_length", int(_scalar(file, f"{arch}.embedding_length")) // heads)
    )
    if arch == "gptneox":
        config |= {"hidden_act": "gelu", "attention_bias": "blk.0.attn_qkv.bias" in file.tensors}
    else:
        config |= {
            "num_key_value_heads": _scalar(file, f"{arch}.attention.head_count_kv", heads),
            "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        }
        config["hidden_activation" if arch == "gemma3" else "hidden_act"] = (
            "gelu_pytorch_tanh" if arch == "gemma3" else "silu"
        )
    if arch in ("llama", "qwen3", "gemma3", "smollm3", "granite"):
        config["head_dim"] = head_dim
    if arch in ("llama", "smollm3", "granite"):
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    config["rope_parameters"] = rope_from_metadata(file, arch, head_dim)
    return config | _own_keys(file, family, head_dim)


def _own_keys(file: GgufFile, family: Family, head_dim: int) -> dict[str, Json]:
    """What only one family has."""
    arch = family.gguf
    num_layers = int(_scalar(file, f"{arch}.block_count"))
    window = int(_scalar(file, f"{arch}.attention.sliding_window", 0)) or None
    if arch == "gemma3":
        wide = num_layers == _GEMMA3_27B_LAYERS
        scalar = int(_scalar(file, "gemma3.embedding_length")) // int(_scalar(file, "gemma3.attention.head_count"))
        return {
            "query_pre_attn_scalar": scalar if wide else head_dim,
            "sliding_window": window,
            "layer_types": _layer_types(file, arch, num_layers, _GEMMA3_PATTERN if window else 1),
            "final_logit_softcapping": _scalar(file, "gemma3.final_logit_softcapping", 0.0) or None,
            "attn_logit_softcapping": _scalar(file, "gemma3.attn_logit_softcapping", 0.0) or None,
        }
    if arch == "granite":
        return {key: _scalar(file, f"granite.{name}", 1.0) for key, name in _GRANITE_SCALES.items()}
    if arch == "smollm3":
        return {
            "no_rope_layer_interval": _SMOLLM3_INTERVAL,
            "no_rope_layers": [int((i + 1) % _SMOLLM3_INTERVAL != 0) for i in range(num_layers)],
            "use_sliding_window": False,
        }
    if arch == "phi3":
        context = _scalar(file, "phi3.context_length")
        original = _scalar(file, "phi3.rope.scaling.original_context_length", context)
        return {"sliding_window": window, "original_max_position_embeddings": original}
    if arch == "olmo2" and window:
        types = _layer_types(file, arch, num_layers, 4)
        return {
            "model_type": "olmo3",
            "architectures": ["Olmo3ForCausalLM"],
            "sliding_window": window,
            "layer_types": types,
        }
    return {}


def _layer_types(file: GgufFile, arch: str, num_layers: int, default: int) -> list[Json]:
    pattern = file.metadata.get(f"{arch}.attention.sliding_window_pattern", default)
    if isinstance(pattern, list):
        sliding = [bool(x) for x in pattern]
    else:
        sliding = [(i + 1) % int(pattern) != 0 for i in range(num_layers)]
    return ["sliding_attention" if x else "full_attention" for x in sliding]


def _scalar(file: GgufFile, key: str, default: float | None = None) -> float:
    value = file.metadata.get(key, default)
    if value is None:
        raise CheckpointError(f"checkpoint {file.path}: metadata {key} is missing")
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int | float):
        raise CheckpointError(f"checkpoint {file.path}: metadata {key} is {value!r:.60}, expected one number")
    return value


def metadata_from_config(config: Mapping[str, Json], family: Family, where: str) -> dict[str, Value]:
    """GGUF's metadata for a config, less the tokenizer's. Raises `ExportError` for what GGUF cannot say."""
    arch = family.gguf
    metadata: dict[str, Value] = {}
    for key, name in _KEYS.get(arch, _LLAMA_KEYS).items():
        value = config.get(key)
        if value is None and key == "n_inner":
            value = 4 * _int(config, "n_embd", where)
        if not isinstance(value, bool | int | float):
            raise ExportError(f"checkpoint {where}: config.json has {key} = {value}, expected a number")
        metadata[f"{arch}.{name}"] = value
    if arch == "gpt2":
        return metadata
    width, heads = _int(config, "hidden_size", where), _int(config, "num_attention_heads", where)
    head_dim = config.get("head_dim") or width // heads
    assert isinstance(head_dim, int)
    rotary = head_dim
    if arch != "gptneox":
        kv_heads = config.get("num_key_value_heads")
        metadata[f"{arch}.attention.head_count_kv"] = kv_heads if isinstance(kv_heads, int) else heads
        metadata[f"{arch}.vocab_size"] = _int(config, "vocab_size", where)
        metadata[f"{arch}.attention.key_length"] = metadata[f"{arch}.attention.value_length"] = head_dim
    rope, partial = metadata_from_rope(config, arch, where)
    rotary = int(head_dim * partial)
    if rotary != head_dim and arch not in ("gptneox", "phi3"):
        raise ExportError(
            f"checkpoint {where}: config.json has partial_rotary_factor {partial}, which {arch} in GGUF lacks"
        )
    metadata[f"{arch}.rope.dimension_count"] = rotary
    return metadata | rope | _own_metadata(config, family, where)


def _own_metadata(config: Mapping[str, Json], family: Family, where: str) -> dict[str, Value]:
    window, context = config.get("sliding_window"), _int(config, "max_position_embeddings", where)
    num_layers = _int(config, "num_hidden_layers", where)
    if family.gguf == "gemma3":
        types = config.get("layer_types")
        if types is not None:
            sliding = [kind == "sliding_attention" for kind in types] if isinstance(types, list) else []
        else:
            pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", _GEMMA3_PATTERN))
            sliding = [(i + 1) % int(str(pattern)) != 0 for i in range(num_layers)]
        metadata: dict[str, Value] = {"gemma3.attention.sliding_window": int(str(window or 0))}
        if sliding != [(i + 1) % _GEMMA3_PATTERN != 0 for i in range(num_layers)]:
            metadata["gemma3.attention.sliding_window_pattern"] = sliding
        if isinstance(cap := config.get("final_logit_softcapping"), int | float):
            metadata["gemma3.final_logit_softcapping"] = float(cap)
        head_dim = config.get("head_dim")
        if num_layers != _GEMMA3_27B_LAYERS and config.get("query_pre_attn_scalar", head_dim) != head_dim:
            raise ExportError(
                f"checkpoint {where}: query_pre_attn_scalar is {config['query_pre_attn_scalar']}, "
                f"and GGUF's gemma3 scales by head_dim, {head_dim}"
            )
        return metadata
    if family.gguf == "granite":
        scales = {name: config.get(key, 1.0) for key, name in _GRANITE_SCALES.items()}
        return {f"granite.{name}": float(x) for name, x in scales.items() if isinstance(x, int | float)}
    if family.gguf == "smollm3":
        layers = config.get("no_rope_layers")
        expected: Json = [int((i + 1) % _SMOLLM3_INTERVAL != 0) for i in range(num_layers)]
        if layers not in (None, expected) or config.get("no_rope_layer_interval", 4) != _SMOLLM3_INTERVAL:
            raise ExportError(f"checkpoint {where}: no_rope_layers is {layers}, and llama.cpp leaves out every fourth")
        return {}
    if family.gguf == "phi3":
        original = config.get("original_max_position_embeddings") or context
        return {
            "phi3.rope.scaling.original_context_length": int(str(original)),
            "phi3.attention.sliding_window": window if isinstance(window, int) else 0,
        }
    slides = isinstance(window, int) and config.get("use_sliding_window", True) and window < context
    if slides and isinstance(window, int):
        # llama.cpp attends to everything here; up to the window that is the same.
        logger.warning("checkpoint %s: GGUF's %s has no sliding window; its context is %d", where, family.gguf, window)
        return {f"{family.gguf}.context_length": window}
    return {}


def _int(config: Mapping[str, Json], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ExportError(f"checkpoint {where}: config.json has {key} = {value}, expected a whole number")
    return value
