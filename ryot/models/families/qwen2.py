"""Qwen2 and Qwen2.5: Llama's shape with biases on query, key and value alone, and windows in the last layers.

Keys and defaults: transformers 5, `Qwen2Config` and `modeling_qwen2.py`.
"""

from __future__ import annotations

import dataclasses

from ryot.models.families import llama
from ryot.models.hf_config import HFConfig
from ryot.models.layer_types import FULL, SLIDING, read_layer_types, read_windows, write_windows
from ryot.models.spec import DecoderSpec

DEFAULTS = llama.Defaults(vocab_size=151_936, num_kv_heads=32, ff_dim=22_016, max_seq_len=32_768)

tensor_maps, unused_tensors, other_name = llama.tensor_maps, llama.unused_tensors, llama.other_name


def read_config(config: HFConfig) -> DecoderSpec:
    spec = llama.read_shape(config, "qwen2", DEFAULTS)
    return dataclasses.replace(spec, qkv_bias=True, layer_windows=read_upper_windows(config, spec.num_layers))


def read_upper_windows(config: HFConfig, num_layers: int) -> tuple[int, ...]:
    """Windows in the layers from `max_window_layers` on, unless `layer_types` says which."""
    window = config.optional_count("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    first = num_layers if window is None else config.integer("max_window_layers", 28)
    types = read_layer_types(config, [SLIDING if i >= first else FULL for i in range(num_layers)])
    return read_windows(config, types, window)


def write_config(spec: DecoderSpec) -> dict[str, object]:
    return llama.write_shape(spec, "Qwen2ForCausalLM") | write_upper_windows(spec)


def write_upper_windows(spec: DecoderSpec) -> dict[str, object]:
    return {"use_sliding_window": bool(spec.layer_windows), **write_windows(spec)}
