"""DecoderSpec: what one decoder is made of, whatever family it comes from.

    # D model dim, E embedding dim, F feed-forward dim, V vocabulary, H head dim, Q all query heads, KV all kv heads

The torch decoder and the graph builder read this description and nothing else. A layer is

    norm_place   attention and feed-forward as branches f of the residual stream x
    pre          x + f(norm(x))
    post         norm(x + f(x))
    output       x + norm(f(x))
    sandwich     x + post_norm(f(norm(x)))

and with `parallel_residual` both branches read the same x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from ryot.errors import require
from ryot.models.rotary import Rotary

Norm = Literal["rms", "layer"]
NormPlace = Literal["pre", "post", "output", "sandwich"]
#: `gelu` is exact (erf), `gelu_tanh` its approximation by tanh.
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
#: Norm of queries and keys before rotation: of each head, or of all heads' channels together.
QKNorm = Literal["none", "head", "all"]

#: Heads that onnxruntime's fused attention takes: of a multiple of this many channels, without and with rotation.
HEAD_MULTIPLE, ROTARY_HEAD_MULTIPLE = 8, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """The structure and the sizes of one decoder. Raises `ConfigError` for values that contradict each other."""

    family: str
    """The module in `ryot.models.families` that reads and writes its checkpoints."""
    vocab_size: int
    """Rows of the embedding table."""
    dim: int
    """Width of the residual stream."""
    num_layers: int
    num_heads: int
    """Number of query heads."""
    num_kv_heads: int
    """Number of key and value heads; divides `num_heads`."""
    head_dim: int
    """Width of one head; `num_heads * head_dim` need not be `dim`."""
    ff_dim: int
    """Width of the feed-forward layer."""
    max_seq_len: int
    """Context in tokens, prompt and generated together."""
    tie_embeddings: bool
    """Whether the output head is the embedding table."""
    norm: Norm
    norm_place: NormPlace
    norm_eps: float
    """Added to the variance, or mean square, before the root."""
    final_norm: bool = True
    """Whether a norm stands before the head."""
    activation: Activation
    gated: bool
    """Whether the feed-forward layer is `down(activation(gate) * up)` instead of `down(activation(up))`."""
    qkv_bias: bool = False
    out_bias: bool = False
    """Of the attention's output projection."""
    ff_bias: bool = False
    head_bias: bool = False
    qk_norm: QKNorm = "none"
    rotaries: tuple[Rotary, ...] = ()
    """The kinds of rotary positions that layers choose from."""
    layer_rotaries: tuple[int, ...] = ()
    """Index into `rotaries` of each layer, -1 for none; empty: all layers have the first, if there is one."""
    layer_windows: tuple[int, ...] = ()
    """Tokens that each layer attends to, itself included, 0 for all; empty: all layers attend to all."""
    learned_positions: bool = False
    """Whether a table of positions is added to the embedding."""
    position_offset: int = 0
    """Rows at the start of that table that no position uses."""
    parallel_residual: bool = False
    embed_dim: int = 0
    """Width of the embedding table where it is projected to `dim` (and back before a tied head); 0: `dim`."""
    embedding_multiplier: float = 1.0
    embedding_scale: bool = False
    """Whether looked-up rows are multiplied by a vector: the table then is a head's, scaled for the head's inputs."""
    residual_multiplier: float = 1.0
    """Factor on each branch before it is added."""
    attention_scale: float = 0.0
    """Factor on the products of queries and keys; 0: `head_dim ** -0.5`."""
    logit_multiplier: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ff_dim",
            "max_seq_len",
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "a whole number above 0")
        for name, known in (("norm", Norm), ("norm_place", NormPlace), ("activation", Activation), ("qk_norm", QKNorm)):
            require(getattr(self, name) in get_args(known), name, getattr(self, name), " or ".join(get_args(known)))
        # No family has it, and neither torch's decoder nor a file's names have a place for such a bias.
        require(not (self.head_bias and self.tie_embeddings), "head_bias", True, "false with tie_embeddings")
        if self.parallel_residual:
            require(self.norm_place == "pre", "norm_place", self.norm_place, "pre with parallel_residual")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads {self.num_heads}",
        )
        multiple = ROTARY_HEAD_MULTIPLE if self.rotaries else HEAD_MULTIPLE
        require(
            self.head_dim % multiple == 0,
            "head_dim",
            self.head_dim,
            f"a multiple of {multiple}, as the fused attention takes",
        )
        for name in ("layer_rotaries", "layer_windows"):
            values = getattr(self, name)
            require(not values or len(values) == self.num_layers, name, values, f"one per layer ({self.num_layers})")
        require(
            all(-1 <= i < len(self.rotaries) for i in self.layer_rotaries),
            "layer_rotaries",
            self.layer_rotaries,
            f"indices below {len(self.rotaries)}, or -1",
        )
        for rotary in self.rotaries:
            require(
                rotary.dim <= self.head_dim and rotary.dim % ROTARY_HEAD_MULTIPLE == 0,
                "rotated channels of a head",
                rotary.dim,
                f"a multiple of {ROTARY_HEAD_MULTIPLE} up to head_dim {self.head_dim}, as the fused attention takes",
            )

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def table_dim(self) -> int:
        """Width of the embedding table."""
        return self.embed_dim or self.dim

    @property
    def scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.attention_scale or self.head_dim**-0.5

    def rotary_kind(self, layer: int) -> int:
        """Index into `rotaries` of a layer's positions, -1 for none."""
        if self.layer_rotaries:
            return self.layer_rotaries[layer]
        return 0 if self.rotaries else -1

    def window(self, layer: int) -> int:
        """Tokens that a layer attends to, itself included; 0 for all, also where the window holds the whole context."""
        window = self.layer_windows[layer] if self.layer_windows else 0
        return window if window < self.max_seq_len else 0

    @property
    def num_parameters(self) -> int:
        """Number of trained values, a tied head counted once."""
        return sum(math.prod(shape) for shape in parameter_shapes(self).values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The sizes that a recipe gives; its family adds the structure."""

    vocab_size: int
    """Number of tokens."""
    dim: int
    """Width of the residual stream."""
    num_layers: int
    """Number of decoder layers."""
    num_heads: int
    """Number of query heads."""
    num_kv_heads: int
    """Number of key and value heads; divides `num_heads`."""
    ff_dim: int
    """Width of the feed-forward layer."""
    max_seq_len: int
    """Context in tokens, prompt and generated together."""
    tie_embeddings: bool
    """Whether the output head is the embedding table."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies, where the family has any."""
    norm_eps: float = 1e-5
    """Added to the variance before the root."""


def linear_names(spec: DecoderSpec) -> list[str]:
    """Names (without `.weight`) of the matrices that a matrix product uses, in the order they are used.

    A tied head is not among them: it is `embedding`.
    """
    ff = "gate_up" if spec.gated else "up"
    names = [f"layers.{i}.{m}" for i in range(spec.num_layers) for m in ("attn.qkv", "attn.out", ff, "down")]
    if spec.embed_dim:
        names = ["project_in", *names, "project_out"]
    return names if spec.tie_embeddings else [*names, "head"]


def table_names(spec: DecoderSpec) -> list[str]:
    """The embedding and, where it is a matrix of its own, the head."""
    return ["embedding"] if spec.tie_embeddings else ["embedding", "head"]


def parameter_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every array of a decoder under the names of the torch decoder's `state_dict()`, matrices [out, in]."""
    return dict(_shapes(spec))


def _shapes(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, E, V = spec.dim, spec.table_dim, spec.vocab_size
    yield "embedding.weight", (V, E)
    if spec.embedding_scale:
        yield "embedding_scale", (E,)
    if spec.learned_positions:
        yield "positions.weight", (spec.max_seq_len + spec.position_offset, D)
    if spec.embed_dim:
        yield "project_in.weight", (D, E)
    for i in range(spec.num_layers):
        yield from ((f"layers.{i}.{name}", shape) for name, shape in layer_shapes(spec).items())
    if spec.final_norm:
        yield from _norm("final_norm", spec)
    if spec.embed_dim:
        yield "project_out.weight", (E, D)
    if not spec.tie_embeddings:
        yield "head.weight", (V, E)
    if spec.head_bias:
        yield "head.bias", (V,)


def layer_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's arrays, under their names within the layer."""
    D, F, Q, KV, H = spec.dim, spec.ff_dim, spec.q_dim, spec.kv_dim, spec.head_dim
    matrices = {
        "attn.qkv": ((Q + 2 * KV, D), spec.qkv_bias),
        "attn.out": ((D, Q), spec.out_bias),
        ("gate_up" if spec.gated else "up"): ((2 * F if spec.gated else F, D), spec.ff_bias),
        "down": ((D, F), spec.ff_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (shape, bias) in matrices.items():
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]
    if spec.qk_norm != "none":
        widths = (H, H) if spec.qk_norm == "head" else (Q, KV)
        shapes |= {"attn.q_norm.weight": widths[:1], "attn.k_norm.weight": widths[1:]}
    norms = ["attn_norm", "ff_norm"]
    if spec.norm_place == "sandwich":
        norms += ["attn_post_norm", "ff_post_norm"]
    for norm in norms:
        shapes |= dict(_norm(norm, spec))
    return shapes


def _norm(name: str, spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    for kind in ("weight",) if spec.norm == "rms" else ("weight", "bias"):
        yield f"{name}.{kind}", (spec.dim,)


def bounded_spec(spec: DecoderSpec, context: int | None) -> DecoderSpec:
    """The same decoder with a context of at most `context` tokens; as it is for None.

    Raises `ConfigError` for a context that the model does not have.
    """
    if context is None:
        return spec
    require(0 < context <= spec.max_seq_len, "context", context, f"1 to the model's own {spec.max_seq_len} tokens")
    return dataclasses.replace(spec, max_seq_len=context)


def narrow_spec(spec: DecoderSpec, width: int) -> DecoderSpec:
    """The decoder that `spec` is cut to at `dim` = `width`: heads, kv heads and `ff_dim` in proportion.

    Raises `ConfigError` for a width that is not narrower or leaves no whole heads.
    """
    counts = {name: getattr(spec, name) * width for name in ("num_heads", "num_kv_heads", "ff_dim")}
    possible = [w for w in range(1, spec.dim) if not any(getattr(spec, name) * w % spec.dim for name in counts)]
    require(width in possible, "width", width, f"one of {possible}" if possible else f"none (of {spec.dim})")
    return dataclasses.replace(spec, dim=width, **{name: count // spec.dim for name, count in counts.items()})
