"""What 8 bits cost a matrix by the size of its blocks, and the sizes that are worth their bytes.

    # B windows, T tokens of all windows, N output features, K input features, C blocks along K, V vocabulary

A block of weights takes its step from its largest value, and so does, at `accuracy_level` 4, a block of inputs, token
by token. Rounding leaves step^2 / 12 of error in each value, independent of the others; what that does to outputs, and
they to the loss, follows from the other side's energy and from the gradients (`calibration`). It takes no product.

On SmolLM2-135M, smoothed, 1,024 tokens of validation text (2026-11-27), KL found: inputs alone rounded in blocks of 32
0.0012 and of 16 0.0008, weights alone in blocks of 32 0.0012, both 0.0024. What is expected orders matrices and sizes;
as a KL it is too small. What was tried beside it: GPTQ at 8 bits, weights alone 0.0010 for 25 s of processor time;
channels sorted by size, so that blocks are even, no gain, since large values move from token to token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ryot.deploy.calibration import Sensitivity
from ryot.deploy.mapped import stream_decoder
from ryot.deploy.selection import Format
from ryot.deploy.weights import DecoderWeights
from ryot.models.block_sizes import BLOCK_SIZES
from ryot.models.tensors import FloatArray

#: Squared error that rounding leaves in a value, as a share of its block's largest one squared: of 127 steps a twelfth.
ROUNDING_ERROR = 127**-2 / 12
#: Output features that are looked at at a time: a table is large.
ROWS = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSizes:
    """Mean squares [K] of a matrix's inputs, tokens weighed by their gradients."""

    energy_K: Tensor
    errors: dict[int, Tensor]
    """Of the errors that rounding leaves, by block size; K is a token as a whole."""


@torch.no_grad()
def measure_inputs(
    weights: DecoderWeights, windows: NDArray[np.int64], sensitivity: Sensitivity
) -> dict[str, InputSizes]:
    """The sizes of the inputs of each matrix product over the token windows [B, T] that the sensitivity is of."""
    model = stream_decoder(weights)
    sizes: dict[str, InputSizes] = {}

    def see(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares_TK = inputs[0].flatten(0, -2).square()
        weights_T = sensitivity.tokens[name] / len(squares_TK)
        block_sizes = (*BLOCK_SIZES, squares_TK.shape[1])
        errors = {size: weights_T @ _rounding_errors(squares_TK, size) for size in block_sizes}
        sizes[name] = InputSizes(energy_K=weights_T @ squares_TK, errors=errors)

    for name in weights.linears:
        if name != weights.head:
            model.get_submodule(name).register_forward_pre_hook(functools.partial(see, name))
    x_BTD, _ = model.trunk(torch.from_numpy(windows), model.table_VE)
    see(weights.head, model, (x_BTD,))
    return sizes


def dynamic_cost(values_NK: FloatArray, bits: int, outputs_N: Tensor, inputs: InputSizes) -> float:
    """What a matrix is expected to cost with one scale for each token and one for each output feature.

    `outputs_N` are its mean squared gradients; `bits` are those of the weights.
    """
    K, steps, cost = values_NK.shape[1], 2 ** (bits - 1) - 1, 0.0
    for start in range(0, len(values_NK), ROWS):
        rows = slice(start, start + ROWS)
        squares_RK = torch.from_numpy(values_NK[rows]).square()
        errors_RK = _rounding_errors(squares_RK, K) * (127 / steps) ** 2
        cost += 0.5 * float(outputs_N[rows] @ (errors_RK @ inputs.energy_K + squares_RK @ inputs.errors[K]))
    return cost


def eight_bit_formats(
    name: str,
    values_NK: FloatArray,
    block_sizes: Sequence[int],
    sensitivity: Sensitivity,
    inputs: InputSizes | None,
) -> list[Format]:
    """The formats of a matrix at 8 bits with what each is expected to cost, in products and in lookups."""
    costs = dict.fromkeys(block_sizes, 0.0)
    for start in range(0, len(values_NK), ROWS):
        rows = slice(start, start + ROWS)
        squares_RK = torch.from_numpy(values_NK[rows]).square()
        for size in block_sizes:
            errors_RK = _rounding_errors(squares_RK, size)
            if inputs is not None:
                outputs_R = sensitivity.outputs[name][rows]
                costs[size] += 0.5 * float(outputs_R @ errors_RK @ inputs.energy_K)
                costs[size] += 0.5 * float(outputs_R @ squares_RK @ inputs.errors[size])
            if name == "embedding":
                costs[size] += 0.5 * float(sensitivity.counts_V[rows] @ errors_RK @ sensitivity.lookup_D)
    N, K = values_NK.shape
    return [
        Format(label=f"8 bits/{size}", price=N * -(-K // size) * (size + 4), expected_kl=costs[size])
        for size in block_sizes
    ]


def _rounding_errors(squares_RK: Tensor, size: int) -> Tensor:
    """Expected squared errors [R, K] of values with these squares, rounded in blocks along K."""
    K = squares_RK.shape[1]
    blocks: Tensor = F.pad(squares_RK, (0, -K % size)).unflatten(-1, (-1, size))
    return (ROUNDING_ERROR * blocks.amax(dim=-1, keepdim=True)).expand_as(blocks).flatten(-2)[:, :K]
