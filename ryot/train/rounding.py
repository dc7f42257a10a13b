"""The last phase of a training through the rounding of its export: gradients of rounded weights move unrounded ones.

    # N output features, K input features, C blocks along K, E values of one block

The straight-through estimator (Bengio et al. 2013, arXiv:1308.3432) by exchange: for a step, parameters hold the
rounded values, and what they held comes back before the optimizer moves it. So the step is computed by the same code,
compiled or not. The rule is that of `ryot.models.blocks`, by which exports round: weights that are on its grid are
rounded to themselves, so the codes that are exported are those that were trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ryot.adaptation import RoundingConfig
from ryot.models.block_sizes import block_size_for
from ryot.models.spec import DecoderSpec, linear_names, table_names
from ryot.train.functions import rms_norm
from ryot.train.model import Decoder


class WeightRounding:
    """Rounds the matrices of one decoder."""

    def __init__(self, model: Decoder, config: RoundingConfig):
        self._model = model
        parameters = dict(model.named_parameters())
        self._formats = {
            f"{name}.weight": (bits, size) for name, (bits, size) in matrix_formats(model.spec, config).items()
        }
        self._parameters = {name: parameters[name] for name in self._formats}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the decoder's parameters hold rounded values."""
        kept = {name: p.data for name, p in self._parameters.items()}
        try:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    # A table that is trained by direction is used, and stored, with normalized rows.
                    used = name == "embedding.weight" and self._model.normalize_embedding
                    values = rms_norm(kept[name]) if used else kept[name]
                    parameter.data = round_blocks(values, *self._formats[name])
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]


def matrix_formats(spec: DecoderSpec, config: RoundingConfig) -> dict[str, tuple[int, int]]:
    """Bits and block size of each matrix (without `.weight`)."""
    tables = set(table_names(spec))
    names = dict.fromkeys([*table_names(spec), *linear_names(spec)])
    shapes = {name: spec.table_dim if name in tables else 0 for name in names}
    return {
        name: (
            config.table_bits if name in tables else config.bits,
            block_size_for(shapes[name], config.block_size) if name in tables else config.block_size,
        )
        for name in names
    }


def round_blocks(values_NK: Tensor, bits: int, block_size: int) -> Tensor:
    """The values that the runtime multiplies with after `ryot.models.blocks` has rounded to nearest; in new memory."""
    N, K = values_NK.shape
    E = block_size_for(K, block_size)
    blocks = F.pad(values_NK, (0, -K % E)).view(N, -1, E) if K % E else values_NK.reshape(N, -1, E)
    zero = 1 << (bits - 1)
    if bits == 8:
        scales = blocks.abs().amax(dim=-1, keepdim=True) / (zero - 1)
    else:
        scales = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True)) / -zero
    scales = torch.where(scales == 0, 1.0, scales)
    rounded = (blocks / scales).round_().clamp_(-zero, zero - 1).mul_(scales)
    return rounded.view(N, -1)[:, :K].contiguous()
