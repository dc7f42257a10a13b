"""Both decoders, ours and transformers', in float64 throughout, so that they agree to its rounding or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from ryot.models.angles import rotary_frequencies
from ryot.train.checkpoint import load_model
from ryot.train.model import Decoder

#: Of the largest logit. Float64 rounds to 1e-16 and the worst seen is 5e-15; one step in float32 gives 1e-8.
TOLERANCE = 1e-12


class _Float64(TorchFunctionMode):
    """Whatever asks for float32 gets float64: transformers computes norms, softmax and angles in float32 by name."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        widened = {key: _widen(value) for key, value in (kwargs or {}).items()}
        return func(*(_widen(value) for value in args), **widened)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def float64() -> Iterator[None]:
    """Float64 for whatever is made and computed inside, without gradients."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def load_reference(folder: Path) -> PreTrainedModel:
    """transformers' model of a checkpoint in float64; run it inside `float64()`."""
    with float64():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model


def load_decoder(folder: Path) -> Decoder:
    """Our decoder of a checkpoint in float64, its angles too."""
    return widen_decoder(load_model(folder))


def widen_decoder(decoder: Decoder) -> Decoder:
    decoder.double()
    for i, rotary in enumerate(decoder.spec.rotaries):
        angles = np.outer(np.arange(decoder.spec.max_seq_len), rotary_frequencies(rotary))
        for name, values in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            setattr(decoder.rotary, f"{name}_{i}", torch.from_numpy(values * rotary.magnitude))
    return decoder


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
