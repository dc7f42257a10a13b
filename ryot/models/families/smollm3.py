"""SmolLM3: Llama's shape with layers that know no positions, by default every fourth.

Keys and defaults: transformers 5, `SmolLM3Config` and `modeling_smollm3.py`.
"""

from __future__ import annotations

import dataclasses

from ryot.errors import CheckpointError
from ryot.models.families import llama
from ryot.models.hf_config import HFConfig
from ryot.models.layer_types import FULL, SLIDING, read_layer_types, read_windows, write_windows
from ryot.models.spec import DecoderSpec

DEFAULTS = llama.Defaults(
    vocab_size=128_256,
    dim=2048,
    num_layers=36,
    num_heads=16,
    num_kv_heads=4,
    max_seq_len=32_768,
    tie_embeddings=True,
    rope_theta=2_000_000.0,
)

tensor_maps, unused_tensors, other_name = llama.tensor_maps, llama.unused_tensors, llama.other_name


def read_config(config: HFConfig) -> DecoderSpec:
    spec = llama.read_shape(config, "smollm3", DEFAULTS)
    rotated = _rotated_layers(config, spec.num_layers)
    window = config.optional_count("sliding_window", None)
    windowed = window is not None and config.flag("use_sliding_window", False)
    types = read_layer_types(config, [FULL if has or not windowed else SLIDING for has in rotated])
    return dataclasses.replace(
        llama.read_biases(config, spec),
        layer_rotaries=tuple(0 if has else -1 for has in rotated),
        # The mask is windowed by `layer_types` alone.
        layer_windows=read_windows(config, types, window),
    )


def _rotated_layers(config: HFConfig, num_layers: int) -> list[bool]:
    flags = config.items("no_rope_layers")
    if flags is None:
        interval = config.count("no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise CheckpointError(f"{config.where}: no_rope_layers is {flags!r}, expected {num_layers} of 0 or 1")
    return [bool(flag) for flag in flags[:num_layers]]


def write_config(spec: DecoderSpec) -> dict[str, object]:
    return (
        llama.write_shape(spec, "SmolLM3ForCausalLM")
        | llama.write_biases(spec)
        | {"no_rope_layers": [int(i >= 0) for i in spec.layer_rotaries]}
        | {"use_sliding_window": bool(spec.layer_windows), **write_windows(spec)}
    )
