"""Decoders of every structure that a spec can describe, tiny, with random weights."""

from __future__ import annotations

import dataclasses

import torch

from ryot.deploy.weights import DecoderWeights
from ryot.models.rotary import Rotary
from ryot.models.spec import DecoderSpec
from ryot.train.checkpoint import build_decoder
from ryot.train.model import Decoder

CONTEXT = 64
ROTARY = Rotary(theta=10_000.0, dim=16)
#: Pre-norm with RMSNorm, rotary positions, a gated feed-forward layer, grouped heads, a tied head.
PLAIN = DecoderSpec(
    family="llama",
    vocab_size=200,
    dim=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ff_dim=96,
    max_seq_len=CONTEXT,
    tie_embeddings=True,
    norm="rms",
    norm_place="pre",
    norm_eps=1e-5,
    activation="silu",
    gated=True,
    rotaries=(ROTARY,),
)
#: Pre-norm with LayerNorm, learned positions and biases.
LEARNED = dataclasses.replace(
    PLAIN,
    norm="layer",
    num_kv_heads=4,
    activation="gelu_tanh",
    gated=False,
    qkv_bias=True,
    out_bias=True,
    ff_bias=True,
    rotaries=(),
    learned_positions=True,
)

SPECS = {
    "plain": PLAIN,
    "heads_of_their_own_width": dataclasses.replace(PLAIN, head_dim=32, rotaries=(Rotary(theta=10_000.0, dim=32),)),
    "heads_of_24": dataclasses.replace(LEARNED, head_dim=24),
    "all_biases": dataclasses.replace(PLAIN, qkv_bias=True, out_bias=True, ff_bias=True),
    "embedding_scale": dataclasses.replace(PLAIN, embedding_scale=True),
    "qkv_bias": dataclasses.replace(PLAIN, qkv_bias=True),
    "head_bias": dataclasses.replace(PLAIN, tie_embeddings=False, head_bias=True),
    "norm_per_head": dataclasses.replace(PLAIN, qk_norm="head"),
    "norm_of_branch_outputs": dataclasses.replace(PLAIN, norm_place="output", qk_norm="all"),
    "sandwich_norms_windows_two_rotaries": dataclasses.replace(
        PLAIN,
        norm_place="sandwich",
        qk_norm="head",
        activation="gelu_tanh",
        embedding_multiplier=8.0,
        attention_scale=0.2,
        rotaries=(ROTARY, Rotary(theta=1000.0, dim=16, scaling="linear", factor=4.0)),
        layer_rotaries=(0, 1, 0),
        layer_windows=(8, 0, 8),
    ),
    "windows": dataclasses.replace(PLAIN, layer_windows=(5, 5, 5)),
    "layers_without_positions": dataclasses.replace(PLAIN, layer_rotaries=(0, -1, 0)),
    "multipliers": dataclasses.replace(
        PLAIN, embedding_multiplier=3.0, residual_multiplier=0.4, attention_scale=0.1, logit_multiplier=0.25
    ),
    "multipliers_and_biases": dataclasses.replace(
        PLAIN, residual_multiplier=0.4, out_bias=True, ff_bias=True, qkv_bias=True
    ),
    "parallel_branches_partial_rotary": dataclasses.replace(
        LEARNED,
        learned_positions=False,
        parallel_residual=True,
        activation="gelu",
        tie_embeddings=False,
        head_dim=32,
        rotaries=(ROTARY,),
    ),
    "partial_rotary": dataclasses.replace(PLAIN, head_dim=32, rotaries=(Rotary(theta=10_000.0, dim=16),)),
    "learned_positions": LEARNED,
    "learned_positions_relu_no_biases": dataclasses.replace(
        LEARNED, activation="relu", qkv_bias=False, out_bias=False, ff_bias=False, position_offset=2
    ),
    "post_norm": dataclasses.replace(LEARNED, norm_place="post", final_norm=False, activation="gelu"),
    "post_norm_projected": dataclasses.replace(
        LEARNED, norm_place="post", final_norm=False, activation="relu", embed_dim=32, position_offset=2
    ),
    "pre_norm_projected_gelu": dataclasses.replace(LEARNED, activation="gelu", embed_dim=32, tie_embeddings=False),
    "scaled_positions": dataclasses.replace(
        PLAIN,
        rotaries=(Rotary(theta=10_000.0, dim=16, scaling="yarn", factor=4.0, original_max_seq_len=16, magnitude=1.14),),
    ),
}


def random_weights(spec: DecoderSpec, seed: int = 0) -> tuple[Decoder, DecoderWeights]:
    """A torch decoder and its arrays, no parameter at a value (zero, one) that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(spec).state_dict().items()}
    arrays = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            array = 0.2 * noise if name.endswith("bias") else 1 + 0.2 * noise
        else:
            array = noise * (2 * shape[1] ** -0.5)
        arrays[name] = array.numpy()
    return build_decoder(spec, arrays), DecoderWeights(spec=spec, arrays=arrays)
