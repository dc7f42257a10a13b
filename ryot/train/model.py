"""The decoder in torch: what is trained, and what every exported graph is checked against.

    # B batch, T new tokens, P past tokens, S = P + T, N query heads, K kv heads, G = N / K, H head dim
    # D model dim, E embedding dim, F feed-forward dim, V vocabulary

What it computes is said by a `DecoderSpec` alone. Query, key and value are one matrix, gate and up are one matrix;
`ryot.models.tensors` takes them apart. Names of parameters are those of `ryot.models.spec.parameter_shapes`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ryot.config import Attention
from ryot.models.angles import rotary_tables
from ryot.models.spec import DecoderSpec
from ryot.train.functions import RMSNorm, rms_norm, rotate, swiglu

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [B, K, S, H]; keys rotated already."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class RotaryTables(nn.Module):
    """Cosines and sines of the rotary angles of each kind, [max_seq_len, dim / 2], not stored in checkpoints."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self._dims = [rotary.dim for rotary in spec.rotaries]
        for i, rotary in enumerate(spec.rotaries):
            cos, sin = rotary_tables(rotary, spec.max_seq_len)
            self.register_buffer(f"cos_{i}", torch.from_numpy(cos), persistent=False)
            self.register_buffer(f"sin_{i}", torch.from_numpy(sin), persistent=False)

    def rotate(self, x_BNTH: Tensor, kind: int, start: int) -> Tensor:
        """Rotate the first channels of each head, half of them with the other half, by position `start` and on."""
        T, dim = x_BNTH.shape[2], self._dims[kind]
        cos = self.get_buffer(f"cos_{kind}")[start : start + T]
        sin = self.get_buffer(f"sin_{kind}")[start : start + T]
        if dim == x_BNTH.shape[-1]:
            return rotate(x_BNTH, cos, sin)
        return torch.cat((rotate(x_BNTH[..., :dim], cos, sin), x_BNTH[..., dim:]), dim=-1)


def causal_mask(T: int, P: int, window: int, x: Tensor) -> Tensor:
    """[T, P + T] of 0 where a new token attends and minus infinity where it does not, in x's type and place."""
    rows = torch.arange(P, P + T, device=x.device)[:, None]
    columns = torch.arange(P + T, device=x.device)
    hidden = columns > rows
    if window:
        hidden |= columns <= rows - window
    return torch.zeros((T, P + T), dtype=x.dtype, device=x.device).masked_fill(hidden, -torch.inf)


class Documents:
    """Which positions of packed sequences belong together, [B, T]; none attends to another document.

    Rotary positions need no start of their own: attention sees their differences alone.
    """

    def __init__(self, documents_BT: Tensor):
        self._documents_BT = documents_BT
        self._masks: dict[int, Tensor] = {}

    def mask(self, window: int, x: Tensor) -> Tensor:
        """[B, 1, T, T] of 0 and minus infinity, as `causal_mask` has it, made once for all layers of a window."""
        if window not in self._masks:
            d_BT = self._documents_BT
            apart = (d_BT[:, :, None] != d_BT[:, None, :])[:, None]
            self._masks[window] = causal_mask(d_BT.shape[1], 0, window, x).masked_fill(apart, -torch.inf)
        return self._masks[window]

    def positions(self) -> Tensor:
        """[B, T] of each token's position in its document."""
        d_BT = self._documents_BT
        index_T = torch.arange(d_BT.shape[1], device=d_BT.device)
        first = torch.ones_like(d_BT, dtype=torch.bool)
        first[:, 1:] = d_BT[:, 1:] != d_BT[:, :-1]
        return index_T - (first * index_T).cummax(dim=1).values


class SelfAttention(nn.Module):
    """Causal attention with packed projections; `attention` says how it is computed, not what."""

    def __init__(self, spec: DecoderSpec, layer: int, attention: Attention):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.q_dim, self.kv_dim, self.scale = spec.q_dim, spec.kv_dim, spec.scale
        self.window, self.attention = spec.window(layer), attention
        self.rotary_kind = spec.rotary_kind(layer)
        self.qkv = nn.Linear(spec.dim, spec.q_dim + 2 * spec.kv_dim, bias=spec.qkv_bias)
        self.out = nn.Linear(spec.q_dim, spec.dim, bias=spec.out_bias)
        self.qk_norm = spec.qk_norm
        if spec.qk_norm != "none":
            widths = (spec.head_dim, spec.head_dim) if spec.qk_norm == "head" else (spec.q_dim, spec.kv_dim)
            self.q_norm, self.k_norm = (RMSNorm(width, eps=spec.norm_eps) for width in widths)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: RotaryTables,
        past: tuple[Tensor, Tensor] | None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, _ = x_BTD.shape
        P = 0 if past is None else past[0].shape[2]
        N, K = self.num_heads, self.num_kv_heads
        # Apart by heads, so that their gradients are put together in one pass. Queries and keys, X = N + K heads, are
        # rotated as one.
        qk_BTXH, v_BTKH = self.qkv(x_BTD).view(B, T, N + 2 * K, self.head_dim).split((N + K, K), dim=2)
        if self.qk_norm != "none":
            qk_BTXH = self._normed(qk_BTXH.flatten(2)).unflatten(2, (N + K, self.head_dim))
        qk_BXTH, v_BKSH = qk_BTXH.transpose(1, 2), v_BTKH.transpose(1, 2)
        if self.rotary_kind >= 0:
            qk_BXTH = rotary.rotate(qk_BXTH, self.rotary_kind, P)
        q_BNTH, k_BKSH = qk_BXTH.split((N, K), dim=1)
        if past is not None:
            k_BKSH, v_BKSH = torch.cat((past[0], k_BKSH), dim=2), torch.cat((past[1], v_BKSH), dim=2)
        y_BNTH = self._attend(q_BNTH, k_BKSH, v_BKSH, documents)
        return self.out(y_BNTH.transpose(1, 2).reshape(B, T, self.q_dim)), (k_BKSH, v_BKSH)

    def _normed(self, qk: Tensor) -> Tensor:
        q, k = qk.split((self.q_dim, self.kv_dim), dim=-1)
        if self.qk_norm == "all":
            return torch.cat((self.q_norm(q), self.k_norm(k)), dim=-1)
        heads = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k))
        return torch.cat([norm(x).flatten(-2) for norm, x in zip((self.q_norm, self.k_norm), heads)], dim=-1)

    def _attend(self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, documents: Documents | None) -> Tensor:
        B, N, T, H = q_BNTH.shape
        K, S = k_BKSH.shape[1], k_BKSH.shape[2]
        mask = None if documents is None else documents.mask(self.window, q_BNTH)
        if self.attention == "sdpa":
            # Without a past and a window that hides something, the kernel needs no mask in memory.
            plain = mask is None and T == S and not 0 < self.window < S
            if mask is None and not plain:
                mask = causal_mask(T, S - T, self.window, q_BNTH)
            return F.scaled_dot_product_attention(
                q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, is_causal=plain, scale=self.scale, enable_gqa=K != N
            )
        # The G query heads of one kv head are stacked along T, so no key or value is copied.
        q_BKGTH = q_BNTH.reshape(B, K, (N // K) * T, H) * self.scale
        scores_BNTS = (q_BKGTH @ k_BKSH.transpose(-1, -2)).view(B, N, T, S)
        # In bf16 too: torch's softmax sums in fp32, and both sides of it are operands of products in bf16.
        mask = causal_mask(T, S - T, self.window, scores_BNTS) if mask is None else mask
        weights = (scores_BNTS + mask).softmax(dim=-1)
        return (weights.view(B, K, (N // K) * T, S) @ v_BKSH).view(B, N, T, H)


class Layer(nn.Module):
    """One layer: attention and feed-forward, with norms where the spec places them."""

    def __init__(self, spec: DecoderSpec, index: int, attention: Attention):
        super().__init__()
        self.place, self.parallel, self.multiplier = spec.norm_place, spec.parallel_residual, spec.residual_multiplier
        self.gated, self.activation = spec.gated, spec.activation
        self.attn = SelfAttention(spec, index, attention)
        self.attn_norm = build_norm(spec)
        if spec.gated:
            self.gate_up = nn.Linear(spec.dim, 2 * spec.ff_dim, bias=spec.ff_bias)
        else:
            self.up = nn.Linear(spec.dim, spec.ff_dim, bias=spec.ff_bias)
        self.down = nn.Linear(spec.ff_dim, spec.dim, bias=spec.ff_bias)
        self.ff_norm = build_norm(spec)
        if spec.norm_place == "sandwich":
            self.attn_post_norm, self.ff_post_norm = build_norm(spec), build_norm(spec)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: RotaryTables,
        past: tuple[Tensor, Tensor] | None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        before = self.place in ("pre", "sandwich")
        y_BTD, present = self.attn(self.attn_norm(x_BTD) if before else x_BTD, rotary, past, documents)
        if self.parallel:
            return self._add(x_BTD, y_BTD + self._feed_forward(self.ff_norm(x_BTD)), "attn"), present
        x_BTD = self._add(x_BTD, y_BTD, "attn")
        y_BTD = self._feed_forward(self.ff_norm(x_BTD) if before else x_BTD)
        return self._add(x_BTD, y_BTD, "ff"), present

    def _add(self, x_BTD: Tensor, y_BTD: Tensor, branch: str) -> Tensor:
        match self.place:
            case "post":
                normed: Tensor = self.get_submodule(f"{branch}_norm")(x_BTD + y_BTD)
                return normed
            case "output":
                y_BTD = self.get_submodule(f"{branch}_norm")(y_BTD)
            case "sandwich":
                y_BTD = self.get_submodule(f"{branch}_post_norm")(y_BTD)
        return x_BTD + (y_BTD if self.multiplier == 1 else y_BTD * self.multiplier)

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        activate = _ACTIVATIONS[self.activation]
        if not self.gated:
            y: Tensor = self.down(activate(self.up(x_BTD)))
        elif self.activation == "silu":
            y = self.down(swiglu(self.gate_up(x_BTD)))
        else:
            gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
            y = self.down(activate(gate) * up)
        return y


class _Unfilled(TorchFunctionMode):
    """Random fills are left out: of parameters on the meta device they would import the compiler, 1 to 2 seconds."""

    FILLS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        if func in self.FILLS:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Decoders that are made within have shapes and no values."""
    with torch.device("meta"), _Unfilled():
        yield


def build_norm(spec: DecoderSpec) -> nn.Module:
    """The norm of the residual stream's width that the spec names."""
    return RMSNorm(spec.dim, eps=spec.norm_eps) if spec.norm == "rms" else nn.LayerNorm(spec.dim, eps=spec.norm_eps)


class Decoder(nn.Module):
    """A causal language model of any family."""

    def __init__(self, spec: DecoderSpec, attention: Attention = "sdpa"):
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.table_dim)
        self.embedding_scale = nn.Parameter(torch.ones(spec.table_dim)) if spec.embedding_scale else None
        self.positions = (
            nn.Embedding(spec.max_seq_len + spec.position_offset, spec.dim) if spec.learned_positions else None
        )
        self.project_in = nn.Linear(spec.embed_dim, spec.dim, bias=False) if spec.embed_dim else None
        self.rotary = RotaryTables(spec)
        self.layers = nn.ModuleList(Layer(spec, i, attention) for i in range(spec.num_layers))
        self.final_norm = build_norm(spec) if spec.final_norm else None
        self.project_out = nn.Linear(spec.dim, spec.embed_dim, bias=False) if spec.embed_dim else None
        self.head = None
        if not spec.tie_embeddings:
            self.head = nn.Linear(spec.table_dim, spec.vocab_size, bias=spec.head_bias)
        self.checkpoint_activations = False
        self.normalize_embedding = False
        self._initialize()

    @property
    def table_VE(self) -> Tensor:
        """The embedding table as it is used: its rows scaled to a root mean square of 1 while trained so."""
        weight = self.embedding.weight
        return rms_norm(weight) if self.normalize_embedding else weight

    def embed(self, ids_BT: Tensor, table_VE: Tensor, start: int, documents: Documents | None = None) -> Tensor:
        """[B, T] ids at position `start` and on, or each in its document, to the residual stream [B, T, D]."""
        x = F.embedding(ids_BT, table_VE)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        if self.spec.embedding_multiplier != 1:
            x = x * self.spec.embedding_multiplier
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            rows = self.positions.weight[self.spec.position_offset + start :]
            x = x + (rows[: ids_BT.shape[1]] if documents is None else rows[documents.positions()])
        return x

    def trunk(
        self,
        ids_BT: Tensor,
        table_VE: Tensor,
        past: Cache | None = None,
        documents_BT: Tensor | None = None,
        *,
        keep_cache: bool = True,
    ) -> tuple[Tensor, Cache]:
        """Everything before the output matrix: [B, T] ids to [B, T, E], and the cache grown by T.

        With `documents_BT`, without a past, tokens attend to their own document alone. Without `keep_cache` the cache
        comes back empty, and what every layer computed is not held until the last one is done.
        """
        documents = None if documents_BT is None else Documents(documents_BT)
        x_BTD = self.embed(ids_BT, table_VE, 0 if past is None else past[0][0].shape[2], documents)
        if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
            # What lies between a GPU's products is bound by its memory, and most of that is this stream.
            x_BTD = x_BTD.bfloat16()
        presents: Cache = []
        for i, layer in enumerate(self.layers):
            args = (x_BTD, self.rotary, None if past is None else past[i], documents)
            if self.checkpoint_activations and self.training:
                x_BTD, present = torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)
            else:
                x_BTD, present = layer(*args)
            if keep_cache:
                presents.append(present)
        return self.finish(x_BTD), presents

    def finish(self, x_BTD: Tensor) -> Tensor:
        """What stands between the last layer and the output matrix, [B, T, E]; logits are products with it."""
        if self.final_norm is not None:
            x_BTD = self.final_norm(x_BTD)
        if self.project_out is not None:
            x_BTD = self.project_out(x_BTD)
        return x_BTD if self.spec.logit_multiplier == 1 else x_BTD * self.spec.logit_multiplier

    def head_weight_VE(self, table_VE: Tensor) -> Tensor:
        """The output matrix, which is the embedding table when tied."""
        return table_VE if self.head is None else self.head.weight

    def forward(self, ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the token that follows each position."""
        x_BTE, _ = self.trunk(ids_BT, self.table_VE, None, documents_BT, keep_cache=False)
        return self.logits(x_BTE)

    def forward_cached(
        self, ids_BT: Tensor, past: Cache | None, documents_BT: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """Logits [B, T, V] and the cache grown by T; `past` is None or what the last call returned."""
        x_BTE, presents = self.trunk(ids_BT, self.table_VE, past, documents_BT)
        return self.logits(x_BTE), presents

    def logits(self, x_BTE: Tensor) -> Tensor:
        """Logits […, V] of what `trunk` gave."""
        bias = None if self.head is None else self.head.bias
        return F.linear(x_BTE, self.head_weight_VE(self.table_VE), bias)

    @torch.no_grad()
    def start_final_norm(self, size: float, *, alternate: bool) -> None:
        """Set the first weights of the norm before the head, every second one negative if `alternate`."""
        last = self.layers[-1]
        assert isinstance(last, Layer)
        # Where there is none, the last layer ends with one.
        norm = self.final_norm or last.ff_norm
        assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
        norm.weight.fill_(size)
        if alternate:
            norm.weight[::2].neg_()

    @torch.no_grad()
    def _initialize(self) -> None:
        spec = self.spec
        if spec.norm_place == "post":
            # torch's own defaults for nn.Embedding, nn.TransformerEncoderLayer and nn.Linear: the historical model's.
            for layer in self.layers:
                assert isinstance(layer, Layer)
                nn.init.xavier_uniform_(layer.attn.qkv.weight)
                for linear in (layer.attn.qkv, layer.attn.out):
                    if linear.bias is not None:
                        nn.init.zeros_(linear.bias)
            return
        for layer in self.layers:
            assert isinstance(layer, Layer)
            for matrix in (layer.attn.qkv.weight, (layer.gate_up if spec.gated else layer.up).weight):
                nn.init.normal_(matrix, std=math.sqrt(1 / (3 * spec.dim)))
            # Each layer starts as the identity.
            nn.init.zeros_(layer.attn.out.weight)
            nn.init.zeros_(layer.down.weight)
        if self.head is None:
            nn.init.normal_(self.embedding.weight, std=0.02)
        else:
            nn.init.normal_(self.embedding.weight, std=1.0)
            nn.init.normal_(self.head.weight, std=0.005)
