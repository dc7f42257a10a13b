"""The plain `torch.onnx` export of a decoder with past and present: what the fused graphs are compared with.

It has the names of the standard graph but no attention mask and no fused operator; every operator is onnx's own. It is
no artifact of a bundle: `benchmarks/` times it, tests take it for a second opinion beside torch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ryot.deploy.blocks import OPSET
from ryot.train.model import Cache, Decoder


class _CachedDecoder(nn.Module):
    """`Decoder.forward_cached` with the cache as a flat list, as an exported function takes it."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        pairs: Cache = list(zip(past[0::2], past[1::2]))
        logits, presents = self.decoder.forward_cached(input_ids, pairs)
        return (logits, *(part for pair in presents for part in pair))


def export_plain(model: Decoder, path: Path) -> Path:
    """Write the plain graph of `model` to `path`, its weights beside it.

    Inputs `input_ids` int64 [B, T] and `past_key_values.N.key|value` float32 [B, K, P, H], P from 0; outputs `logits`
    [B, T, V] and `present.N.key|value`.
    """
    spec = model.spec
    plain = Decoder(spec, attention="explicit").eval()
    plain.load_state_dict(model.state_dict())
    names = [f"{layer}.{part}" for layer in range(spec.num_layers) for part in ("key", "value")]
    # Lengths above 1 in the example: torch.export takes 0 and 1 for fixed sizes.
    ids = torch.zeros((2, 3), dtype=torch.int64)
    past = [torch.zeros((2, spec.num_kv_heads, 5, spec.head_dim)) for _ in names]
    batch, new, old = (torch.export.Dim.DYNAMIC for _ in range(3))
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            _CachedDecoder(plain),
            (ids, past),
            path,
            dynamo=True,
            external_data=True,
            opset_version=OPSET,
            input_names=["input_ids", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            dynamic_shapes=({0: batch, 1: new}, [{0: batch, 2: old} for _ in names]),
        )
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress on stdout and warns of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
