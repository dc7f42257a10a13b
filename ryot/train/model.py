"""The decoder in torch, both architectures: what is trained, and what every exported graph is checked against.

    # B batch, T new tokens, P past tokens, S = P + T, N query heads, K kv heads, G = N / K, H head dim,
    # D model dim, F feed-forward dim, V vocabulary

`opt` is the historical SimpleTransformerModel made causal: learned positions, post-norm layers, GELU (erf), biases,
no norm after the last layer, which is OPT with `do_layer_norm_before=False`. `llama` has RoPE (half rotation),
pre-RMSNorm, SwiGLU and grouped-query heads, no biases. Query, key and value are one matrix, gate and up are one
matrix; `hf.py` takes them apart.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryot.config import Attention, ModelConfig
from ryot.train.functions import RMSNorm, rms_norm, rotate, swiglu

#: OPT's position table starts with two rows that no position uses (transformers, modeling_opt.py).
OPT_POSITION_OFFSET = 2

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [B, K, S, H]; keys rotated already."""


class Rotary(nn.Module):
    """Cosines and sines of the rotary angles, [max_seq_len, H/2] each, not stored in checkpoints."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        half = cfg.head_dim // 2
        frequencies = cfg.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(cfg.max_seq_len, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def rotate(self, x_BNTH: Tensor, start: int) -> Tensor:
        """Rotate by position `start`, `start + 1`, …; the first half of H is paired with the second."""
        T = x_BNTH.shape[2]
        return rotate(x_BNTH, self.cos[start : start + T], self.sin[start : start + T])


class SelfAttention(nn.Module):
    """Causal attention with packed projections; `attention` says how it is computed, not what."""

    mask_TT: Tensor

    def __init__(self, cfg: ModelConfig, attention: Attention):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.kv_dim, self.attention = cfg.kv_dim, attention
        bias = cfg.architecture == "opt"
        self.qkv = nn.Linear(cfg.dim, cfg.dim + 2 * cfg.kv_dim, bias=bias)
        self.out = nn.Linear(cfg.dim, cfg.dim, bias=bias)
        T = cfg.max_seq_len
        self.register_buffer("mask_TT", torch.full((T, T), -torch.inf).triu(1), persistent=False)

    def forward(
        self, x_BTD: Tensor, rotary: Rotary | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, D = x_BTD.shape
        P = 0 if past is None else past[0].shape[2]
        N, K = self.num_heads, self.num_kv_heads
        # Queries and keys, X = N + K heads, are rotated as one.
        qk, v = self.qkv(x_BTD).split((D + self.kv_dim, self.kv_dim), dim=-1)
        qk_BXTH = qk.view(B, T, N + K, self.head_dim).transpose(1, 2)
        v_BKSH = v.view(B, T, K, self.head_dim).transpose(1, 2)
        if rotary is not None:
            qk_BXTH = rotary.rotate(qk_BXTH, P)
        q_BNTH, k_BKSH = qk_BXTH.split((N, K), dim=1)
        if past is not None:
            k_BKSH, v_BKSH = torch.cat((past[0], k_BKSH), dim=2), torch.cat((past[1], v_BKSH), dim=2)
        y_BNTH = self._attend(q_BNTH, k_BKSH, v_BKSH)
        return self.out(y_BNTH.transpose(1, 2).reshape(B, T, D)), (k_BKSH, v_BKSH)

    def _attend(self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
        B, N, T, H = q_BNTH.shape
        K, S = k_BKSH.shape[1], k_BKSH.shape[2]
        mask_TS = self.mask_TT[S - T : S, :S]
        if self.attention == "sdpa":
            if T == S:
                return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, enable_gqa=K != N)
            return F.scaled_dot_product_attention(
                q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_TS.to(q_BNTH.dtype), enable_gqa=K != N
            )
        # The G query heads of one kv head are stacked along T, so no key or value is copied.
        q_BKGTH = q_BNTH.reshape(B, K, (N // K) * T, H) * H**-0.5
        scores_BNTS = (q_BKGTH @ k_BKSH.transpose(-1, -2)).view(B, N, T, S)
        # In bf16 too: torch's softmax sums in fp32, and both sides of it are operands of products in bf16.
        weights = (scores_BNTS + mask_TS.to(scores_BNTS.dtype)).softmax(dim=-1)
        return (weights.view(B, K, (N // K) * T, S) @ v_BKSH).view(B, N, T, H)


class OptLayer(nn.Module):
    """Post-norm layer of the historical model."""

    def __init__(self, cfg: ModelConfig, attention: Attention):
        super().__init__()
        self.attn = SelfAttention(cfg, attention)
        self.attn_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.up = nn.Linear(cfg.dim, cfg.ff_dim)
        self.down = nn.Linear(cfg.ff_dim, cfg.dim)
        self.ff_norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)

    def forward(
        self, x_BTD: Tensor, rotary: Rotary | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y_BTD, present = self.attn(x_BTD, rotary, past)
        x_BTD = self.attn_norm(x_BTD + y_BTD)
        return self.ff_norm(x_BTD + self.down(F.gelu(self.up(x_BTD)))), present


class LlamaLayer(nn.Module):
    """Pre-norm layer with SwiGLU."""

    def __init__(self, cfg: ModelConfig, attention: Attention):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.attn = SelfAttention(cfg, attention)
        self.ff_norm = RMSNorm(cfg.dim, eps=cfg.norm_eps)
        self.gate_up = nn.Linear(cfg.dim, 2 * cfg.ff_dim, bias=False)
        self.down = nn.Linear(cfg.ff_dim, cfg.dim, bias=False)

    def forward(
        self, x_BTD: Tensor, rotary: Rotary | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y_BTD, present = self.attn(self.attn_norm(x_BTD), rotary, past)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.down(swiglu(self.gate_up(self.ff_norm(x_BTD)))), present


class Decoder(nn.Module):
    """A causal language model of either architecture."""

    def __init__(self, cfg: ModelConfig, attention: Attention = "sdpa"):
        super().__init__()
        self.cfg = cfg
        layer = OptLayer if cfg.architecture == "opt" else LlamaLayer
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.positions = (
            nn.Embedding(cfg.max_seq_len + OPT_POSITION_OFFSET, cfg.dim) if cfg.architecture == "opt" else None
        )
        self.rotary = Rotary(cfg) if cfg.architecture == "llama" else None
        self.layers = nn.ModuleList(layer(cfg, attention) for _ in range(cfg.num_layers))
        self.final_norm = RMSNorm(cfg.dim, eps=cfg.norm_eps) if cfg.architecture == "llama" else None
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        self.checkpoint_activations = False
        self.normalize_embedding = False
        self._initialize()

    @property
    def table_VD(self) -> Tensor:
        """The embedding table as it is used: its rows scaled to a root mean square of 1 while trained so."""
        weight = self.embedding.weight
        return rms_norm(weight) if self.normalize_embedding else weight

    def trunk(self, ids_BT: Tensor, table_VD: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Everything before the output matrix: [B, T] ids to [B, T, D], and the cache grown by T."""
        P = 0 if past is None else past[0][0].shape[2]
        x_BTD = F.embedding(ids_BT, table_VD)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[OPT_POSITION_OFFSET + P :][: ids_BT.shape[1]]
        presents: Cache = []
        for i, layer in enumerate(self.layers):
            args = (x_BTD, self.rotary, None if past is None else past[i])
            if self.checkpoint_activations and self.training:
                x_BTD, present = torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)
            else:
                x_BTD, present = layer(*args)
            presents.append(present)
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        return x_BTD, presents

    def head_weight_VD(self, table_VD: Tensor) -> Tensor:
        """The output matrix, which is the embedding table when tied."""
        return table_VD if self.head is None else self.head.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the token that follows each position."""
        return self.forward_cached(ids_BT, None)[0]

    def forward_cached(self, ids_BT: Tensor, past: Cache | None) -> tuple[Tensor, Cache]:
        """Logits [B, T, V] and the cache grown by T; `past` is None or what the last call returned."""
        table_VD = self.table_VD
        x_BTD, presents = self.trunk(ids_BT, table_VD, past)
        return F.linear(x_BTD, self.head_weight_VD(table_VD)), presents

    @torch.no_grad()
    def start_final_norm(self, size: float, *, alternate: bool) -> None:
        """Set the first weights of the norm before the head, every second one negative if `alternate`."""
        last = self.layers[-1]
        assert isinstance(last, (OptLayer, LlamaLayer))
        # `opt` has none of its own: its last layer ends with one.
        weight = (self.final_norm or last.ff_norm).weight
        weight.fill_(size)
        if alternate:
            weight[::2].neg_()

    @torch.no_grad()
    def _initialize(self) -> None:
        cfg = self.cfg
        if cfg.architecture == "opt":
            # torch's own defaults for nn.Embedding, nn.TransformerEncoderLayer and nn.Linear: the historical model's.
            for layer in self.layers:
                assert isinstance(layer, OptLayer)
                nn.init.xavier_uniform_(layer.attn.qkv.weight)
                nn.init.zeros_(layer.attn.qkv.bias)
                nn.init.zeros_(layer.attn.out.bias)
            return
        for layer in self.layers:
            assert isinstance(layer, LlamaLayer)
            for matrix in (layer.attn.qkv.weight, layer.gate_up.weight):
                nn.init.normal_(matrix, std=math.sqrt(1 / (3 * cfg.dim)))
            # Each layer starts as the identity.
            nn.init.zeros_(layer.attn.out.weight)
            nn.init.zeros_(layer.down.weight)
        if self.head is None:
            nn.init.normal_(self.embedding.weight, std=0.02)
        else:
            nn.init.normal_(self.embedding.weight, std=1.0)
            nn.init.normal_(self.head.weight, std=0.005)
