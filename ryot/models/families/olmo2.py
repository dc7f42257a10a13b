"""OLMo 2: norms behind attention and feed-forward instead of before, and on all queries' and all keys' channels.

Keys and defaults: transformers 5, `Olmo2Config` and `modeling_olmo2.py`. `clip_qkv` was OLMo 1's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ryot.models.families import llama
from ryot.models.hf_config import HFConfig
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import TensorMap

DEFAULTS = llama.Defaults(vocab_size=50_304, norm_eps=1e-5)

unused_tensors, other_name = llama.unused_tensors, llama.other_name


def read_config(config: HFConfig) -> DecoderSpec:
    config.require(clip_qkv=None)
    spec = llama.read_shape(config, "olmo2", DEFAULTS)
    bias = config.flag("attention_bias", False)
    return dataclasses.replace(spec, norm_place="output", qk_norm="all", qkv_bias=bias, out_bias=bias)


def write_config(spec: DecoderSpec) -> dict[str, object]:
    return llama.write_shape(spec, "Olmo2ForCausalLM") | {"attention_bias": spec.qkv_bias}


def tensor_maps(spec: DecoderSpec) -> Iterator[TensorMap]:
    yield from llama.table_maps(spec)
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield from llama.matrix_maps(spec, ours, theirs)
        yield from llama.qk_norm_maps(spec, ours, theirs)
        yield TensorMap(f"{ours}.attn_norm.weight", (f"{theirs}.post_attention_layernorm.weight",))
        yield TensorMap(f"{ours}.ff_norm.weight", (f"{theirs}.post_feedforward_layernorm.weight",))
