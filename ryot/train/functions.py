"""Pieces of the Llama layer with their gradients written out: fewer passes over memory than autograd makes of them.

    # … any leading dims, D width, F feed-forward width, H head dim

On a CPU these are bound by memory, and autograd keeps and reads an array for every small operation: RMSNorm of [1024,
128] takes 0.9 ms forward and backward this way instead of 2.6 ms (one Zen 3 core, torch 2.13). Without gradients they
are torch's own operators, so that evaluation and export see the plain ones, and so they are while a compiler reads
them, which fuses passes itself and cannot see into what writes to given arrays. Gradients are checked against
autograd's in `tests/train/test_functions.py`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with a faster backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class Context(Protocol):
    """What torch hands from a forward pass to its backward pass."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Any, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class ScaledContext(Context, Protocol):
    scale: float


def _by_hand(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`x` [… D] divided by its root mean square, times `weight` [D]; computed in fp32, returned in x's type."""
    if _by_hand(x):
        return _RMSNorm.apply(x, weight, torch.finfo(torch.float32).eps if eps is None else eps)  # type: ignore[no-any-return,no-untyped-call]
    return F.rms_norm(x, (x.shape[-1],), None if weight is None else weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x32 = x.float()
        mean_square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        normed = x32 * scale
        ctx.save_for_backward(normed, scale, weight)
        result: Tensor = (normed if weight is None else normed * weight).to(x.dtype)
        return result

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        d_out = grads[0].float()
        product = (d_out * normed).flatten(0, -2)
        width = normed.shape[-1]
        if weight is None:
            d_weight, along = None, product.sum(dim=-1)
        else:
            # A frozen weight, beside adapters, has no gradient.
            d_weight, along = product.sum(0) if ctx.needs_input_grad[1] else None, product @ weight
            d_out = d_out * weight
        along = along.mul_(-1 / width).view_as(scale)
        dx = torch.addcmul(d_out, normed, along).mul_(scale)
        return dx.to(grads[0].dtype), d_weight, None


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of [… 2F], gate first: [… F]."""
    if _by_hand(gate_up):
        return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return,no-untyped-call]
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        (d_out,) = grads
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        torch.mul(d_out, active, out=d_up)
        torch.ops.aten.silu_backward.grad_input(torch.mul(d_out, up, out=active), gate, grad_input=d_gate)
        return d_gate_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of [… T, H] (the first half of H with the second) by angles whose `cos`, `sin` are [T, H/2]."""
    if _by_hand(x):
        return _Rotate.apply(x, torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))  # type: ignore[no-any-return,no-untyped-call]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        # A rotation's transpose is the rotation back.
        cos, sin = ctx.saved_tensors
        (d_out,) = grads
        dx = (d_out * cos).addcmul_(d_out.roll(d_out.shape[-1] // 2, dims=-1), sin, value=-1)
        return dx.to(d_out.dtype), None, None


def lora_linear(x: Tensor, base: nn.Linear, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`base(x) + scale * (x @ A.T) @ B.T` of a frozen layer, x [… K], A [r, K], B [N, r]: [… N]."""
    return _LoraLinear.apply(x, base.weight, base.bias, A, B, scale)  # type: ignore[no-any-return,no-untyped-call]


class _LoraLinear(torch.autograd.Function):
    """Both products of either pass are summed where they are made: autograd would make and add two arrays."""

    @staticmethod
    def forward(
        ctx: ScaledContext, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        z = F.linear(x, A).mul_(scale)
        ctx.save_for_backward(x, weight, A, B, z)
        ctx.scale = scale
        out = F.linear(x, weight, bias)
        out.flatten(0, -2).addmm_(z.flatten(0, -2), B.t())
        return out

    @staticmethod
    def backward(ctx: ScaledContext, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, A, B, z = ctx.saved_tensors
        d_out = grads[0].flatten(0, -2)
        dz = torch.mm(d_out, B).mul_(ctx.scale)
        dA, dB = dz.t() @ x.flatten(0, -2), d_out.t() @ z.flatten(0, -2)
        if not ctx.needs_input_grad[0]:
            return None, None, None, dA, dB, None
        return torch.mm(d_out, weight).addmm_(dz, A).view_as(x), None, None, dA, dB, None
