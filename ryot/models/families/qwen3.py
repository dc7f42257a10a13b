"""Qwen3: Llama's shape with a norm on each head's query and key, and heads of a width of their own.

Keys and defaults: transformers 5, `Qwen3Config` and `modeling_qwen3.py`.
"""

from __future__ import annotations

import dataclasses

from ryot.models.families import llama, qwen2
from ryot.models.hf_config import HFConfig
from ryot.models.spec import DecoderSpec

DEFAULTS = dataclasses.replace(qwen2.DEFAULTS, head_dim=128)

tensor_maps, unused_tensors, other_name = llama.tensor_maps, llama.unused_tensors, llama.other_name


def read_config(config: HFConfig) -> DecoderSpec:
    spec = llama.read_shape(config, "qwen3", DEFAULTS)
    bias = config.flag("attention_bias", False)
    windows = qwen2.read_upper_windows(config, spec.num_layers)
    return dataclasses.replace(spec, qk_norm="head", qkv_bias=bias, out_bias=bias, layer_windows=windows)


def write_config(spec: DecoderSpec) -> dict[str, object]:
    shape = llama.write_shape(spec, "Qwen3ForCausalLM")
    return shape | {"attention_bias": spec.qkv_bias} | qwen2.write_upper_windows(spec)
