"""Written-out gradients against autograd's, on the same operations in torch's own operators."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ryot.train.functions import RMSNorm, rms_norm, rotate, swiglu

#: Two orders of the same few dozen fp32 operations on values of order 1.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_rotate(x: Tensor) -> Tensor:
    cos, sin = angles(x.shape[-2], x.shape[-1] // 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def angles(length: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(length), 100.0 ** -(torch.arange(half) / half))
    return angle.cos(), angle.sin()


PAIRS = {
    "rms_norm": (lambda x: rms_norm(x, eps=1e-5), lambda x: F.rms_norm(x, (x.shape[-1],), eps=1e-5)),
    "swiglu": (swiglu, plain_swiglu),
    "rotate": (lambda x: rotate(x, *angles(x.shape[-2], x.shape[-1] // 2)), plain_rotate),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_those_of_autograd(name: str) -> None:
    ours, plain = PAIRS[name]
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16, requires_grad=True)
    weight = torch.randn(ours(x).shape)
    torch.testing.assert_close(ours(x), plain(x), **TOLERANCE)
    torch.testing.assert_close(
        torch.autograd.grad((ours(x) * weight).sum(), x), torch.autograd.grad((plain(x) * weight).sum(), x), **TOLERANCE
    )
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


def test_the_norms_weight_gets_autograds_gradient() -> None:
    torch.manual_seed(0)
    ours, plain = RMSNorm(16, eps=1e-5), torch.nn.RMSNorm(16, eps=1e-5)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        ours.weight.copy_(plain.weight.uniform_(-1, 1))
    for norm in (ours, plain):
        # Without a gradient in x the plain operator is taken, so x has one.
        (norm(x.clone().requires_grad_()) * x.cos()).sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, **TOLERANCE)


def test_a_half_precision_input_is_normed_in_fp32_and_given_back_in_its_type() -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 64) * 100).bfloat16().requires_grad_()
    out = rms_norm(x)
    assert out.dtype == torch.bfloat16
    exact = F.rms_norm(x.detach().float(), (64,))
    # One rounding to 8 bits of mantissa.
    torch.testing.assert_close(out.float(), exact, atol=0, rtol=2**-8)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and math.isfinite(x.grad.sum().item())
