"""Mistral: Llama's shape with a sliding window in every layer, where there is one.

Keys and defaults: transformers 5, `MistralConfig` and `modeling_mistral.py`. `layer_types` belongs to other classes.
"""

from __future__ import annotations

import dataclasses

from ryot.models.families import llama
from ryot.models.hf_config import HFConfig
from ryot.models.layer_types import SLIDING, read_windows
from ryot.models.spec import DecoderSpec

DEFAULTS = llama.Defaults(num_kv_heads=8, ff_dim=14_336, max_seq_len=131_072)

tensor_maps, unused_tensors, other_name = llama.tensor_maps, llama.unused_tensors, llama.other_name


def read_config(config: HFConfig) -> DecoderSpec:
    config.require(layer_types=None)
    spec = llama.read_shape(config, "mistral", DEFAULTS)
    window = config.optional_count("sliding_window", 4096)
    types = [] if window is None else [SLIDING] * spec.num_layers
    return dataclasses.replace(spec, layer_windows=read_windows(config, types, window))


def write_config(spec: DecoderSpec) -> dict[str, object]:
    return llama.write_shape(spec, "MistralForCausalLM") | {"sliding_window": max(spec.layer_windows, default=None)}
