"""Attention of a piece of a prompt over an int8 cache, in float32; steps leave it to the fused operator.

The operator multiplies with int8 keys and values token by token, as a step wants it. Of a piece it would read the whole
past for each token: 128 tokens behind 1,000 took 72 ms in six layers of width 512, over the same keys and values as
float32 26. Few tokens are not worth making those, so a graph that takes any number of new tokens chooses as it runs.

Either way comes to the same: new keys and values are rounded as the cache keeps them before a token attends to them.
A pair's prefill graph has no such choice to make: it attends to its new tokens as they are, and rounds behind that.

    # B batch, S new tokens, P past tokens, T positions of the cache, K kv heads, H head width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from ryot.deploy.blocks import MS, GraphBuilder, split_qkv
from ryot.models.tensors import FloatArray

#: New tokens of a row from which on float32 takes less time, at any depth.
MANY_TOKENS = 17


class NewTokens(NamedTuple):
    """Names of what a call's tokens say about its attention, each [1]."""

    past: str
    """Tokens before the new ones."""
    total: str
    many: str
    """Whether there are `MANY_TOKENS`."""


class Int8Cache(NamedTuple):
    """A layer's cache: names of its past and present, keys first, and the scales [1] or [K * H] of both."""

    past: Sequence[str]
    present: Sequence[str]
    scales: Sequence[FloatArray]


def count_new_tokens(g: GraphBuilder, ids: str, total: str) -> NewTokens:
    """What `ids` [B, S] and the total length say."""
    count = g.node("Shape", [ids], ["new.count"], start=1, end=2)
    wide = g.node("Cast", [total], ["new.total_wide"], to=TensorProto.INT64)
    length = g.node("Reshape", [wide, g.constant("one_value", np.array([1], np.int64))], ["new.total"])
    few = g.constant("few_tokens", np.array([MANY_TOKENS - 1], np.int64))
    return NewTokens(
        past=g.node("Sub", [length, count], ["new.past"]),
        total=length,
        many=g.node("Greater", [count, few], ["new.many"]),
    )


def attend_to_int8(
    g: GraphBuilder,
    qkv: Sequence[str],
    name: str,
    cache: Int8Cache,
    new: NewTokens,
    step: Callable[[Sequence[str], str], str],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int,
    rotary: tuple[str, str] | None,
    rotary_dim: int,
    lengths: tuple[str, str],
) -> str:
    """Like `blocks.attention`; `step(present, name)` is that of a few tokens.

    Rows that are given many tokens at once have as many before them, as an engine feeds them.
    """

    def many() -> list[str]:
        at = f"{name}.many"
        q, k, v = qkv if len(qkv) == 3 else split_qkv(g, qkv[0], at, num_heads * head_dim, num_kv_heads * head_dim)
        if rotary is not None:
            q, k = (
                g.node(
                    "RotaryEmbedding",
                    [x, new.past, *rotary],
                    [f"{at}.{part}_turned"],
                    domain=MS,
                    num_heads=heads,
                    rotary_embedding_dim=rotary_dim if rotary_dim < head_dim else 0,
                )
                for x, part, heads in ((q, "q", num_heads), (k, "k", num_kv_heads))
            )
        rounded, before, kept = [], [], []
        for x, past, scales, part in zip((k, v), cache.past, cache.scales, ("k", "v"), strict=True):
            held = _Part(g, f"{at}.{part}", scales, num_kv_heads, head_dim)
            codes = held.encode(x)
            rounded.append(held.decode(codes, f"{at}.{part}_rounded", by_head=False))
            start = _cut(g, past, "no_pad", new.past, f"{at}.{part}_past")
            before.append(held.decode(start, f"{at}.{part}_before", by_head=True))
            rest = _cut(g, past, new.total, "end_of_cache", f"{at}.{part}_rest")
            kept.append(g.node("Concat", [start, held.by_head(codes), rest], [f"{at}.{part}_kept"], axis=2))
        attributes: dict[str, object] = {"num_heads": num_heads, "kv_num_heads": num_kv_heads, "scale": scale}
        if window:
            attributes["local_window_size"] = window
        outputs = [f"{at}.mix", f"{at}.k_float", f"{at}.v_float"]
        g.node("GroupQueryAttention", [q, *rounded, *before, *lengths], outputs, domain=MS, **attributes)
        return [outputs[0], *kept]

    def few() -> list[str]:
        present = [f"{name}.few.{part}" for part in ("key", "value")]
        return [step(present, f"{name}.few"), *present]

    g.constant("no_pad", np.array([0], np.int64))
    g.constant("end_of_cache", np.array([np.iinfo(np.int64).max], np.int64))
    g.constant("cache_axis", np.array([2], np.int64))
    kinds = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT8)
    return g.choose(new.many, many, few, [f"{name}.mix", *cache.present], kinds)


class _Part:
    """Keys or values of a layer, to the cache's codes and back."""

    def __init__(self, g: GraphBuilder, at: str, scales: FloatArray, num_kv_heads: int, head_dim: int):
        self._g, self._at, self._shape = g, at, (num_kv_heads, head_dim)
        self._zero = g.constant("zero_point", np.array(0, np.int8))
        self._scale = g.constant(f"{at}.scale", scales[0] if len(scales) == 1 else np.array(1, np.float32))
        self._scales = scales if len(scales) > 1 else None

    def encode(self, x: str) -> str:
        """int8 of [B, S, K * H]."""
        g, at = self._g, self._at
        if self._scales is not None:
            x = g.node("Div", [x, g.constant(f"{at}.scales", self._scales)], [f"{at}.scaled"])
        return g.node("QuantizeLinear", [x, self._scale, self._zero], [f"{at}.codes"])

    def by_head(self, codes: str) -> str:
        """[B, S, K * H] to [B, K, S, H]."""
        g, at = self._g, self._at
        heads = g.constant("kv_heads", np.array([0, 0, *self._shape], np.int64))
        return g.node(
            "Transpose", [g.node("Reshape", [codes, heads], [f"{at}.heads"])], [f"{at}.new"], perm=[0, 2, 1, 3]
        )

    def decode(self, codes: str, out: str, *, by_head: bool) -> str:
        """float32 of codes, [B, K, P, H] `by_head`, else [B, S, K * H]."""
        g = self._g
        if self._scales is None:
            return g.node("DequantizeLinear", [codes, self._scale, self._zero], [out])
        plain = g.node("DequantizeLinear", [codes, self._scale, self._zero], [f"{out}.codes"])
        shape = (1, self._shape[0], 1, self._shape[1]) if by_head else (-1,)
        return g.node("Mul", [plain, g.constant(f"{out}.scales", self._scales.reshape(shape))], [out])


def _cut(g: GraphBuilder, x: str, start: str, stop: str, out: str) -> str:
    return g.node("Slice", [x, start, stop, "cache_axis"], [out])


# Prefill graphs of pairs


def load_int8(g: GraphBuilder, cache: str, scales: FloatArray, head_dim: int, held: str) -> str:
    """Keys or values [B, K, P, H] in float32 of what an int8 cache [B, K, T, H] holds; `held` is P.

    `scales` are one [1] or one a channel [K * H].
    """
    start, axis = g.constant("no_pad", np.array([0], np.int64)), g.constant("cache_axis", np.array([2], np.int64))
    codes = g.node("Slice", [cache, start, held, axis], [f"{cache}.held"])
    values = g.node("Cast", [codes], [f"{cache}.codes"], to=TensorProto.FLOAT)
    by_channel = scales if len(scales) == 1 else scales.reshape(1, -1, 1, head_dim)
    return g.node("Mul", [values, g.constant(f"{cache}.scales", by_channel)], [f"{cache}.float"])


def store_int8(g: GraphBuilder, x: str, scales: FloatArray, head_dim: int, unused: str, out: str) -> str:
    """Keys or values [B, K, T, H] in float32 to an int8 cache [B, K, T + U, H]; `unused` comes of `cache_positions`.

    `scales` are one [1] or one a channel [K * H]. Those that come of `load_int8` get the codes that they had.
    """
    scale, zero = np.array(1, np.float32), g.constant("zero_point", np.array(0, np.int8))
    if len(scales) == 1:
        scale = scales[0]
    else:
        x = g.node("Div", [x, g.constant(f"{out}.scales", scales.reshape(1, -1, 1, head_dim))], [f"{out}.scaled"])
    codes = g.node("QuantizeLinear", [x, g.constant(f"{out}.scale", np.asarray(scale)), zero], [f"{out}.codes"])
    return g.node("Pad", [codes, unused, "", g.constant("cache_axis", np.array([2], np.int64))], [out])


def cache_positions(g: GraphBuilder, cache: str, total: str, ids: str) -> tuple[str, str]:
    """How many positions [1] a `cache` [B, K, T, H] holds, and [2] a zero and how many it has left; for `Pad`.

    `total` is the length with the new tokens `ids` [B, S]. A cache that grows has none left.
    """
    length = g.node("Cast", [total], ["cache.total"], to=TensorProto.INT64)
    new = g.node("Shape", [ids], ["prompt.length"], start=1, end=2)
    held = g.node("Sub", [length, new], ["cache.held"])
    room = g.node("Shape", [cache], ["cache.room"], start=2, end=3)
    left = g.node("Sub", [room, length], ["cache.left"])
    zero = g.constant("no_pad", np.array([0], np.int64))
    unused = g.node("Concat", [zero, g.node("Max", [left, zero], ["cache.rest"])], ["cache.unused"], axis=0)
    return held, unused
