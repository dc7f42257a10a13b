"""Rotary positions in GGUF and config.json: base, linear and yarn are metadata, llama3 and longrope are tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ryot.errors import CheckpointError, ExportError
from ryot.models.sources.checkpoint import FloatArray, Json
from ryot.models.sources.gguf_file import GgufFile, Value

_LLAMA3_FACTORS = "rope_freqs.weight"
#: yarn's numbers: Hugging Face's key -> GGUF's below rope.scaling. Those that are absent are defaults in both.
_YARN = {
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
#: llama.cpp's base for the sliding layers of Gemma 3, and what stands for a base that a file does not name.
_DEFAULT_BASE = 10_000.0


def rope_from_metadata(file: GgufFile, arch: str, head_dim: int) -> dict[str, Json]:
    """`rope_parameters` of config.json. Raises `CheckpointError` naming a kind of scaling that is not read."""
    prefix = f"{arch}.rope"
    rope: dict[str, Json] = {"rope_type": "default", "rope_theta": _number(file, f"{prefix}.freq_base", _DEFAULT_BASE)}
    kind = file.metadata.get(f"{prefix}.scaling.type", "none")
    factor = _number(file, f"{prefix}.scaling.factor", _number(file, f"{prefix}.scale_linear", 1.0))
    original = file.metadata.get(f"{prefix}.scaling.original_context_length")
    if _LLAMA3_FACTORS in file.tensors:
        rope |= llama3_parameters(_vector(file, _LLAMA3_FACTORS), float(str(rope["rope_theta"])), str(file.path))
    elif "rope_factors_long.weight" in file.tensors:
        rope |= {
            "rope_type": "longrope",
            "long_factor": [float(x) for x in _vector(file, "rope_factors_long.weight")],
            "short_factor": [float(x) for x in _vector(file, "rope_factors_short.weight")],
        }
        if isinstance(original, int):
            rope["original_max_position_embeddings"] = original
            rope["factor"] = _number(file, f"{arch}.context_length", original) / original
    elif kind == "linear" or (kind == "none" and factor != 1.0):
        if factor != 1.0:
            rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        if isinstance(original, int):
            rope["original_max_position_embeddings"] = original
        for hf, name in _YARN.items():
            if isinstance(value := file.metadata.get(f"{prefix}.scaling.{name}"), int | float):
                rope[hf] = value
    elif kind != "none":
        raise CheckpointError(f"checkpoint {file.path}: {prefix}.scaling.type is {kind}, expected none, linear or yarn")
    rotary = int(_number(file, f"{prefix}.dimension_count", head_dim))
    if arch in ("gptneox", "phi3"):
        rope["partial_rotary_factor"] = rotary / head_dim
    elif rotary != head_dim:
        raise CheckpointError(f"checkpoint {file.path}: {prefix}.dimension_count is {rotary}, expected {head_dim}")
    if arch == "gemma3":
        local = _number(file, f"{prefix}.freq_base_swa", _DEFAULT_BASE)
        return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return rope


def metadata_from_rope(config: Mapping[str, Json], arch: str, where: str) -> tuple[dict[str, Value], float]:
    """GGUF's metadata for a config's positions, and the share of a head that turns.

    Raises `ExportError` naming a kind of scaling that GGUF lacks.
    """
    rope = rope_of(config)
    metadata: dict[str, Value] = {}
    if arch == "gemma3":
        local = _float((_mapping(rope.get("sliding_attention"))).get("rope_theta", config.get("rope_local_base_freq")))
        metadata["gemma3.rope.freq_base_swa"] = _DEFAULT_BASE if local is None else local
        rope = _mapping(rope.get("full_attention")) or rope
    theta = _float(rope.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base"))))
    metadata[f"{arch}.rope.freq_base"] = _DEFAULT_BASE if theta is None else theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = f"{arch}.rope.scaling"
    if kind in ("linear", "yarn"):
        metadata[f"{scaling}.type"] = str(kind)
        metadata[f"{scaling}.factor"] = _float(rope.get("factor")) or 1.0
        original = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        if kind == "yarn" and isinstance(original, int):
            metadata[f"{scaling}.original_context_length"] = original
            for hf, name in _YARN.items():
                if (value := _float(rope.get(hf))) is not None:
                    metadata[f"{scaling}.{name}"] = value
    elif kind == "llama3" and arch not in ("llama", "smollm3", "granite", "qwen2", "qwen3"):
        raise ExportError(f"checkpoint {where}: rope_type llama3 has no place in GGUF's {arch}")
    elif kind not in ("default", "llama3"):
        raise ExportError(f"checkpoint {where}: rope_type {kind}, expected default, linear, yarn or llama3 for GGUF")
    partial = _float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct"))))
    if partial is None:
        partial = 0.25 if arch == "gptneox" else 1.0
    return metadata, partial


def rope_of(config: Mapping[str, Json]) -> dict[str, Json]:
    """The positions' parameters of a config, as transformers 5 (rope_parameters) or 4 (rope_scaling) writes them."""
    return _mapping(config.get("rope_parameters")) or _mapping(config.get("rope_scaling"))


def llama3_factors(rope: Mapping[str, Json], theta: float, head_dim: int) -> FloatArray:
    """What Llama 3 divides each frequency by, [head_dim / 2]: 1 for short waves, `factor` for long ones."""
    factor, low, high = (_required(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _required(rope, "original_max_position_embeddings")
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - kept) / factor + kept)).astype(np.float32)


def llama3_parameters(factors: FloatArray, theta: float, where: str) -> dict[str, Json]:
    """Llama 3's parameters from the factors that GGUF keeps of them.

    Between the long and the short waves the share that is kept is linear in the frequency, kept = a / wave - b, with
    a = original / (high - low), b = low / (high - low). Only ratios of the three show; `low` is 1 in every model known.
    Raises `CheckpointError` when no parameters give these factors.
    """
    factor = float(factors.max())
    head_dim = 2 * len(factors)
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    between = (factors > 1.0 + 1e-4) & (factors < factor * (1 - 1e-4))
    candidates = [(8192, 4.0)]
    if between.sum() >= 2:
        kept = (1.0 / factors[between].astype(np.float64) - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, shift = np.polyfit(1.0 / waves[between], kept, 1)
        high = 1.0 - 1.0 / shift
        candidates.insert(0, (round(slope * (high - 1.0)), round(high, 3)))
    for original, high in candidates:
        rope: dict[str, Json] = {
            "rope_type": "llama3",
            "factor": round(factor, 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if high > 1.0 and np.allclose(llama3_factors(rope, theta, head_dim), factors, rtol=1e-4):
            return rope
    raise CheckpointError(f"checkpoint {where}: {_LLAMA3_FACTORS} is not what Llama 3's formula gives")


def _vector(file: GgufFile, name: str) -> FloatArray:
    return file.dequantize(name, file.rows(name)).ravel()


def _number(file: GgufFile, key: str, default: float) -> float:
    value = file.metadata.get(key, default)
    if not isinstance(value, int | float):
        raise CheckpointError(f"checkpoint {file.path}: metadata {key} is {value!r:.60}, expected a number")
    return value


def _required(rope: Mapping[str, Json], key: str) -> float:
    if (value := _float(rope.get(key))) is None:
        raise ExportError(f"config.json: rope_parameters has no {key}")
    return value


def _float(value: Json) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _mapping(value: Json) -> dict[str, Json]:
    return value if isinstance(value, dict) else {}
