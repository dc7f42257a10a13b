"""What calibration text says of each matrix: the second moments of its inputs, and how much its outputs matter.

    # B windows, T tokens, N output features, K input features, D model dim, V vocabulary

Both come of one decoder in torch that shares the checkpoint's arrays. Activations are not kept: each matrix sums them
up, or is rounded, when the forward pass reaches it.

How much an output matters is the diagonal of the Fisher information: with labels drawn from the model itself, the mean
squared gradient g of the loss by an output y is the curvature of KL there, so an independent error e of that output
costs about g^2 e^2 / 2 nats (Martens 2020, arXiv:1412.1193, section 9). Summed over outputs this puts all matrices on
one scale, before any quantized graph exists. Tokens are weighed by their own g^2: the first token of a text, which all
others attend to, has both inputs of a thousand times the usual size and the largest gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ryot.deploy.mapped import stream_decoder
from ryot.deploy.weights import DecoderWeights
from ryot.models.tensors import FloatArray
from ryot.train.model import Decoder

#: Tokens of one backward pass: its activations are what takes memory.
SENSITIVITY_WINDOW = 256
#: Rows of the output matrix that are multiplied at a time; a whole vocabulary of logits takes much memory.
LOGIT_ROWS = 128


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments [K, K] of a matrix's inputs over two texts."""

    fit_KK: Tensor
    """To round by: all tokens alike."""
    cost_KK: Tensor
    """To judge by: other text, tokens weighed by their gradients."""


OnMatrix = Callable[[str, Moments], None]
"""Called with a matrix's name and the moments of its inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """Mean squared gradient of the loss by the outputs of each matrix product, [N], and by a looked-up row, [D]."""

    outputs: dict[str, Tensor]
    tokens: dict[str, Tensor]
    """Of each matrix the weight of every token, [B * T], 1 on average: half alike, half by its squared gradient."""
    lookup_D: Tensor
    counts_V: Tensor
    """How often each row is looked up in the calibration text, as a share of its tokens."""

    def product_cost(self, name: str, errors_N: Tensor) -> float:
        """Nats of KL that mean squared output errors [N] of a product cost, to second order."""
        return 0.5 * float(self.outputs[name] @ errors_N)

    def lookup_cost(self, errors_RD: Tensor, rows: slice = slice(None)) -> float:
        """The same of errors [R, D] in some rows of a table."""
        return 0.5 * float(self.counts_V[rows] @ (errors_RD.square() @ self.lookup_D))


def measure_sensitivity(weights: DecoderWeights, windows: NDArray[np.int64], *, seed: int = 0) -> Sensitivity:
    """One forward and backward pass over token windows [B, T], with labels drawn from the model's own predictions."""
    model = stream_decoder(weights)
    generator = torch.Generator().manual_seed(seed)
    energy: dict[str, Tensor] = {}
    by_token: dict[str, list[Tensor]] = {}

    def add(name: str, gradient_BTN: Tensor) -> None:
        square_TN = gradient_BTN.flatten(0, -2).square()
        energy[name] = energy.get(name, 0) + square_TN.sum(dim=0)
        by_token.setdefault(name, []).append(square_TN.sum(dim=1))

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(functools.partial(add, name))

        return see

    for name in _layer_linears(weights):
        model.get_submodule(name).register_forward_hook(watch(name))
    pieces = _cut(windows, SENSITIVITY_WINDOW)
    for ids_T in pieces:
        lookup_TD, head_V, head_T = _backward(model, ids_T, generator)
        add("lookup", lookup_TD)
        energy[weights.head] = energy.get(weights.head, 0) + head_V
        by_token.setdefault(weights.head, []).append(head_T)
    tokens = sum(map(len, pieces))
    counts_V = torch.bincount(torch.from_numpy(windows.reshape(-1)), minlength=weights.spec.vocab_size) / windows.size
    lookup_D = energy.pop("lookup") / tokens
    outputs = {name: square / tokens for name, square in energy.items()}
    weights_of = {name: _token_weights(torch.cat(pieces)) for name, pieces in by_token.items()}
    return Sensitivity(outputs=outputs, tokens=weights_of, lookup_D=lookup_D, counts_V=counts_V)


@torch.no_grad()
def capture_moments(
    weights: DecoderWeights,
    fit: NDArray[np.int64],
    cost: NDArray[np.int64],
    token_weights: Mapping[str, Tensor],
    on_matrix: OnMatrix,
) -> None:
    """One forward pass over token windows [B, T] of two texts that hands each matrix's moments over, in order.

    The moments of one matrix exist at a time. `token_weights` [B * T] are those of `cost`.
    """
    model = stream_decoder(weights)

    def moments(name: str, x_BTK: Tensor) -> Moments:
        x_MK = x_BTK.reshape(-1, x_BTK.shape[-1])
        fit_MK, cost_MK = x_MK[: fit.size], x_MK[fit.size :]
        weighed_MK = cost_MK * token_weights[name][:, None]
        return Moments(fit_MK.T @ fit_MK / len(fit_MK), weighed_MK.T @ cost_MK / len(cost_MK))

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            on_matrix(name, moments(name, inputs[0]))

        return see

    for name in _layer_linears(weights):
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    for layer in model.layers:
        # The keys and values of all tokens, which nobody reads, would be kept till the end.
        layer.register_forward_hook(lambda module, inputs, out: (out[0], None))
    x_BTD, _ = model.trunk(torch.from_numpy(np.concatenate((fit, cost))), model.table_VE)
    on_matrix(weights.head, moments(weights.head, x_BTD))


@torch.no_grad()
def measure_input_sizes(weights: DecoderWeights, windows: NDArray[np.int64]) -> dict[str, FloatArray]:
    """Mean absolute value of each input [K] of every matrix product over token windows [B, T]."""
    model = stream_decoder(weights)
    sizes: dict[str, FloatArray] = {}

    def see(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes[name] = inputs[0].abs().mean(dim=(0, 1)).numpy()

    for name in _layer_linears(weights):
        model.get_submodule(name).register_forward_pre_hook(functools.partial(see, name))
    x_BTD, _ = model.trunk(torch.from_numpy(windows), model.table_VE)
    sizes[weights.head] = x_BTD.abs().mean(dim=(0, 1)).numpy()
    return sizes


def _backward(model: Decoder, ids_T: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by the rows looked up [T, D], and the squared ones by logits, over T and over V.

    Layers are computed twice, so that the activations and weights of only one are there at a time.
    """
    table_TD = model.table_VE[ids_T].requires_grad_()
    embedded_BTD = model.embed(torch.arange(len(ids_T))[None], table_TD, 0)
    inputs = [embedded_BTD.detach()]
    with torch.no_grad():
        for layer in model.layers:
            inputs.append(layer(inputs[-1], model.rotary, None)[0])
    last_BTD = inputs.pop().requires_grad_()
    finished_BTD = model.finish(last_BTD)
    gradient, head_V, head_T = _label_gradients(finished_BTD.detach(), model.head_weight_VE(model.table_VE), generator)
    gradient = _gradient(finished_BTD, last_BTD, gradient)
    for layer, input_BTD in zip(reversed(model.layers), reversed(inputs), strict=True):
        gradient = _gradient(layer(input_BTD.requires_grad_(), model.rotary, None)[0], input_BTD, gradient)
    return _gradient(embedded_BTD, table_TD, gradient), head_V, head_T


def _gradient(out: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by a leaf, of the gradient by what was made of it."""
    out.backward(gradient)
    assert leaf.grad is not None
    return leaf.grad


def _layer_linears(weights: DecoderWeights) -> list[str]:
    return [name for name in weights.linears if name != weights.head]


def _cut(windows: NDArray[np.int64], length: int) -> list[Tensor]:
    """Pieces of at most `length` tokens of the windows."""
    return [piece for window in windows for piece in torch.from_numpy(window).split(length)]


def _token_weights(energy_T: Tensor) -> Tensor:
    return 0.5 + 0.5 * energy_T / energy_T.mean().clamp_min(1e-30)


def _label_gradients(x_BTD: Tensor, head_VD: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The loss gradient by the head's inputs for labels it draws, and the squared one by logits, over T and over V."""
    x_TD = x_BTD[0]
    gradients, head_V, head_T = [], torch.zeros(len(head_VD)), []
    for rows_RD in x_TD.split(LOGIT_ROWS):
        p_RV = F.linear(rows_RD, head_VD).softmax(dim=-1)
        labels_R = torch.multinomial(p_RV, 1, generator=generator)
        # Over labels the mean squared gradient of a logit is p (1 - p), which has no noise.
        square_RV = p_RV - p_RV.square()
        head_V += square_RV.sum(dim=0)
        head_T.append(square_RV.sum(dim=1))
        p_RV.scatter_add_(1, labels_R, torch.full(labels_R.shape, -1.0))
        gradients.append(p_RV @ head_VD)
    return torch.cat(gradients)[None], head_V, torch.cat(head_T)
