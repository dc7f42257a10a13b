"""What quantization costs: KL, top-1 agreement and bits per byte, computed by the exported graphs in onnxruntime."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ryot.deploy.standard import StandardGraph
from ryot.edge.bundle import TOKENIZER_NAME, load_bundle
from ryot.errors import ConfigError

#: Name of the float32 graphs among the results.
REFERENCE = "reference"
#: Held-out tokens that a quality figure is taken over, at least.
MIN_TOKENS = 20_000
#: Bits per byte of a form over those of fp32, above which it is no candidate for the bundle.
MAX_BPB_RATIO = 1.01


class EvalData(Protocol):
    """Held-out text as token windows; `ryot.train.dataset.Dataset` is one."""

    @property
    def byte_lengths(self) -> NDArray[np.int64]: ...

    @property
    def corpus_sha256(self) -> str: ...

    def windows(self, split: str, count: int, length: int) -> NDArray[np.int64]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """A form's held-out quality, against fp32 on the same tokens."""

    tokens: int
    loss: float
    """Nats per token."""
    bpb: float
    """Bits per byte of text."""
    bpb_ratio: float
    """`bpb` over that of fp32."""
    kl: float
    """Mean KL divergence from fp32's distribution to this form's, nats per token."""
    top1: float
    """Share of positions at which both hold the same token most likely."""

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def quality_windows(data: EvalData, split: str, length: int, *, tokens: int = MIN_TOKENS) -> NDArray[np.int64]:
    """Evenly spread windows [n, length + 1] that hold at least `tokens` targets, or all that the split has."""
    return data.windows(split, -(-tokens // length), length)


def evaluate_forms(
    reference: StandardGraph,
    forms: Mapping[str, StandardGraph],
    windows: NDArray[np.int64],
    byte_lengths: NDArray[np.int64],
) -> dict[str, Quality]:
    """The quality of each form on `windows` int64 [n, T + 1], and of the reference itself under `REFERENCE`.

    Windows go through one at a time: dynamic int8 takes one activation scale for all rows of a call, and on the
    device a call has one row.
    """
    sums = {name: np.zeros(3) for name in (REFERENCE, *forms)}
    for window in windows:
        ids, targets = window[None, :-1], torch.from_numpy(window[1:])
        expected = _log_probabilities(reference, ids)
        best, probabilities = expected.argmax(-1), expected.exp()
        sums[REFERENCE] += (F.nll_loss(expected, targets, reduction="sum").item(), 0.0, len(targets))
        for name, graph in forms.items():
            found = _log_probabilities(graph, ids)
            sums[name] += (
                F.nll_loss(found, targets, reduction="sum").item(),
                (probabilities * (expected - found)).sum().item(),
                (found.argmax(-1) == best).sum().item(),
            )
    num_tokens = windows[:, 1:].size
    num_bits = math.log(2) * float(byte_lengths[windows[:, 1:]].sum())
    return {
        name: Quality(
            tokens=num_tokens,
            loss=float(nats / num_tokens),
            bpb=float(nats / num_bits),
            bpb_ratio=float(nats / sums[REFERENCE][0]),
            # Two equal distributions differ by rounding, which may come out below 0.
            kl=max(0.0, float(kl / num_tokens)),
            top1=float(agree / num_tokens),
        )
        for name, (nats, kl, agree) in sums.items()
    }


def evaluate_bundle(
    path: Path, reference: Path, windows: NDArray[np.int64], byte_lengths: NDArray[np.int64], *, threads: int = 1
) -> Quality:
    """The quality of the bundle at `path` against the one at `reference`, on token windows int64 [n, T + 1].

    Both are run through their standard graphs: of a pair that is the decode half. Raises `BundleError` for a damaged
    bundle and `ConfigError` when the two do not share their tokens.
    """
    bundles = [load_bundle(p) for p in (path, reference)]
    if bundles[0].files[TOKENIZER_NAME] != bundles[1].files[TOKENIZER_NAME]:
        raise ConfigError(
            f"reference {reference}: has another tokenizer than {path}", hint="compare forms of one model"
        )
    graph, expected = (StandardGraph(b.path / b.graphs["standard"], threads=threads) for b in bundles)
    return evaluate_forms(expected, {"form": graph}, windows, byte_lengths)["form"]


def worst(a: Quality, b: Quality) -> Quality:
    """The quality of a pair: in each figure the worse of its halves."""
    low = a if a.bpb >= b.bpb else b
    return dataclasses.replace(low, kl=max(a.kl, b.kl), top1=min(a.top1, b.top1))


def _log_probabilities(graph: StandardGraph, ids_BS: NDArray[np.int64]) -> torch.Tensor:
    logits, _ = graph.run(ids_BS)
    return F.log_softmax(torch.from_numpy(logits[0]), dim=-1)
