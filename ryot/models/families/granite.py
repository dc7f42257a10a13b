"""Granite: Llama's shape with multipliers on embedding, branches, attention and logits.

Keys and defaults: transformers 5, `GraniteConfig` and `modeling_granite.py`.
"""

from __future__ import annotations

import dataclasses

from ryot.models.families import llama
from ryot.models.hf_config import HFConfig
from ryot.models.spec import DecoderSpec

tensor_maps, unused_tensors, other_name = llama.tensor_maps, llama.unused_tensors, llama.other_name


def read_config(config: HFConfig) -> DecoderSpec:
    return dataclasses.replace(
        llama.read_biases(config, llama.read_shape(config, "granite", llama.Defaults())),
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        attention_scale=config.positive("attention_multiplier", 1.0),
        logit_multiplier=1 / config.positive("logits_scaling", 1.0),
    )


def write_config(spec: DecoderSpec) -> dict[str, object]:
    return (
        llama.write_shape(spec, "GraniteForCausalLM")
        | llama.write_biases(spec)
        | {
            "embedding_multiplier": spec.embedding_multiplier,
            "residual_multiplier": spec.residual_multiplier,
            "attention_multiplier": spec.scale,
            "logits_scaling": 1 / spec.logit_multiplier,
        }
    )
