"""What it costs that the runtime rounds a matrix's inputs to int8, by the size of their blocks.

    # B windows, T tokens of all windows, N output features, K input features, C blocks along K

At `accuracy_level` 4 a block of inputs takes its step from its own largest value, token by token, so smaller blocks
have smaller steps. Rounding leaves step^2 / 12 of error in each input, independent of the others; what that does to
outputs, and they to the loss, follows from the weights and the gradients (`calibration`). It takes no product.

On SmolLM2-135M, smoothed, 1,024 tokens, KL expected here and found with inputs alone rounded: blocks of 32 0.0009 and
0.0012, of 16 0.0006 and 0.0008 (2026-11-27); no matrix but the head takes more than a twentieth. Sorting channels by
size, so that blocks are even, saved nothing: the large values move from token to token.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ryot.deploy.calibration import Sensitivity
from ryot.deploy.weights import DecoderWeights
from ryot.models.tensors import FloatArray
from ryot.train.checkpoint import build_decoder

#: Blocks that peaks are kept of; others are made of whole ones.
PEAK_BLOCK = 16
#: Codes on either side of zero that inputs are rounded to.
INPUT_CODES = 127


@torch.no_grad()
def measure_input_peaks(weights: DecoderWeights, windows: NDArray[np.int64]) -> dict[str, Tensor]:
    """Largest absolute value in each block of `PEAK_BLOCK` inputs, [T, C], of each matrix product over windows."""
    model = build_decoder(weights.spec, weights.arrays)
    peaks: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_TK = inputs[0].flatten(0, -2)
        blocks = F.pad(x_TK, (0, -x_TK.shape[1] % PEAK_BLOCK)).unflatten(-1, (-1, PEAK_BLOCK))
        peaks[name] = blocks.abs().amax(dim=-1)

    for name in weights.linears:
        if name != weights.head:
            model.get_submodule(name).register_forward_pre_hook(functools.partial(see, name))
    x_BTD, _ = model.trunk(torch.from_numpy(windows), model.table_VE)
    see(weights.head, model, (x_BTD,))
    return peaks


def input_costs(
    name: str, values_NK: FloatArray, peaks_TC: Tensor, sensitivity: Sensitivity, block_sizes: list[int]
) -> list[float]:
    """Nats of KL that a matrix costs by its rounded inputs, for each of the block sizes."""
    per_input_K = torch.from_numpy(values_NK).square().T @ sensitivity.outputs[name]
    per_block_C = F.pad(per_input_K, (0, -len(per_input_K) % PEAK_BLOCK)).unflatten(0, (-1, PEAK_BLOCK)).sum(dim=1)
    weights_T = sensitivity.tokens[name]
    costs = []
    for size in block_sizes:
        together = size // PEAK_BLOCK
        grouped = F.pad(peaks_TC, (0, -peaks_TC.shape[1] % together)).unflatten(-1, (-1, together)).amax(dim=-1)
        errors_C = weights_T @ (grouped / INPUT_CODES).square() / len(weights_T) / 12
        costs.append(0.5 * float(errors_C.repeat_interleave(together)[: len(per_block_C)] @ per_block_C))
    return costs
