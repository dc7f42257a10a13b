"""What GGUF calls the tensors of each family, and how it stores them otherwise than Hugging Face does.

Where they differ (from llama.cpp's converter and graphs, read 2026-11-26): Llama's rotary embedding turns neighbouring
rows of a head and Hugging Face's the two halves, so rows of q and k are stored in another order; GPT-NeoX's q, k and v
alternate by head in one and follow each other in the other; Gemma's norms hold their scale and not scale minus one;
GPT-2's matrices are [out, in] in GGUF and [in, out] in Hugging Face.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


class Storing(enum.Enum):
    """How a tensor of GGUF becomes Hugging Face's."""

    SAME = enum.auto()
    ROTARY_Q = enum.auto()
    ROTARY_K = enum.auto()
    NEOX_QKV = enum.auto()
    LESS_ONE = enum.auto()
    TRANSPOSED = enum.auto()


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One architecture under both names.

    `top` and `layer` are Hugging Face's module -> GGUF's, `layer` below `layer_prefix`; each may have a weight and a
    bias. `head` is the module that a tied checkpoint leaves out. `storing` is by Hugging Face's module in a layer.
    """

    gguf: str
    model_type: str
    architecture: str
    top: dict[str, str]
    layer: dict[str, str]
    layer_prefix: str = "model.layers"
    head: str = "lm_head"
    storing: dict[str, Storing] = field(default_factory=dict)
    norms_less_one: bool = False

    def names(self, num_layers: int) -> dict[str, tuple[str, Storing]]:
        """Hugging Face's name -> GGUF's and how it is stored, for every tensor that the family may have."""
        modules = {hf: (gguf, self._storing(hf, hf)) for hf, gguf in self.top.items()}
        for i in range(num_layers):
            for hf, gguf in self.layer.items():
                modules[f"{self.layer_prefix}.{i}.{hf}"] = (f"blk.{i}.{gguf}", self._storing(hf, gguf))
        names = {}
        for hf, (gguf, storing) in modules.items():
            for part in ("weight", "bias"):
                # A bias has no second axis that could be turned.
                kept = storing if part == "weight" or storing is not Storing.TRANSPOSED else Storing.SAME
                names[f"{hf}.{part}"] = (f"{gguf}.{part}", kept)
        return names

    def _storing(self, hf: str, gguf: str) -> Storing:
        if self.norms_less_one and "norm" in hf:
            return Storing.LESS_ONE
        return self.storing.get(hf, Storing.SAME)


def row_order(storing: Storing, rows: int, num_heads: int, num_kv_heads: int) -> NDArray[np.int64] | None:
    """The row of GGUF's tensor that each row of Hugging Face's is; None when the order is the same."""
    index = np.arange(rows)
    if storing is Storing.ROTARY_Q:
        return index.reshape(num_heads, -1, 2).swapaxes(1, 2).ravel()
    if storing is Storing.ROTARY_K:
        return index.reshape(num_kv_heads, -1, 2).swapaxes(1, 2).ravel()
    if storing is Storing.NEOX_QKV:
        return index.reshape(3, num_heads, -1).swapaxes(0, 1).ravel()
    return None


_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_LLAMA = {**_PRE_NORMS, **_ATTENTION, **_GATED}
_ROTARY = {"self_attn.q_proj": Storing.ROTARY_Q, "self_attn.k_proj": Storing.ROTARY_K}

FAMILIES = (
    Family(gguf="llama", model_type="llama", architecture="LlamaForCausalLM", top=_TOP, layer=_LLAMA, storing=_ROTARY),
    # Mistral is Llama to GGUF, so a file is never read as it.
    Family(
        gguf="llama", model_type="mistral", architecture="MistralForCausalLM", top=_TOP, layer=_LLAMA, storing=_ROTARY
    ),
    Family(
        gguf="smollm3", model_type="smollm3", architecture="SmolLM3ForCausalLM", top=_TOP, layer=_LLAMA, storing=_ROTARY
    ),
    Family(
        gguf="granite", model_type="granite", architecture="GraniteForCausalLM", top=_TOP, layer=_LLAMA, storing=_ROTARY
    ),
    Family(gguf="qwen2", model_type="qwen2", architecture="Qwen2ForCausalLM", top=_TOP, layer=_LLAMA),
    Family(gguf="qwen3", model_type="qwen3", architecture="Qwen3ForCausalLM", top=_TOP, layer={**_LLAMA, **_QK_NORMS}),
    Family(
        gguf="gemma3",
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        top=_TOP,
        layer={
            **_ATTENTION,
            **_QK_NORMS,
            **_GATED,
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
        norms_less_one=True,
    ),
    Family(
        gguf="olmo2",
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        top=_TOP,
        layer={
            **_ATTENTION,
            **_QK_NORMS,
            **_GATED,
            "post_attention_layernorm": "post_attention_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
    ),
    Family(
        gguf="phi3",
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        top=_TOP,
        layer={
            **_PRE_NORMS,
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    ),
    Family(
        gguf="gpt2",
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        top={
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        layer_prefix="transformer.h",
        layer={
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        storing=dict.fromkeys(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), Storing.TRANSPOSED),
    ),
    Family(
        gguf="gptneox",
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        top={
            "gpt_neox.embed_in": "token_embd",
            "gpt_neox.final_layer_norm": "output_norm",
            "embed_out": "output",
        },
        head="embed_out",
        layer_prefix="gpt_neox.layers",
        layer={
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        storing={"attention.query_key_value": Storing.NEOX_QKV},
    ),
)
