"""What quantization costs: KL, top-1 agreement and bits per byte, computed by the exported graphs in onnxruntime.

    # B rows, S new tokens, T tokens of a window, V vocabulary

The gate is a paired sequential test. Artifact and reference read the same windows; at a few planned looks the interval
of the ratio of their losses, windows being the units that repeat, is held against the limit, and the test ends when
the interval lies on one side of it for every artifact. Each look is taken at 1 % a side, so `len(LOOKS)` of them decide
wrongly in at most that many percent (Bonferroni). At the last look the ratio itself decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ryot.config import QUALITY_TOKENS
from ryot.deploy.standard import StandardGraph
from ryot.edge.bundle import TOKENIZER_NAME, load_bundle
from ryot.errors import ConfigError, DataError
from ryot.models.tensors import FloatArray
from ryot.report.stats import t_quantile

#: Name of the float32 reference among the results.
REFERENCE = "reference"
#: Held-out tokens after which the test may end, and those that it takes at most.
LOOKS = (2_048, 4_096, 8_192, QUALITY_TOKENS)
#: Bits per byte of an artifact over those of fp32, above which it is no candidate for the bundle.
MAX_BPB_RATIO = 1.01
#: Tokens of a window, whatever the context: logits of more take much memory, and fewer windows tell less.
WINDOW_TOKENS = 256
#: Positions up to which one long window is read, where the context has them.
DEPTH_TOKENS = 2_048
#: Positions whose logits are compared at a time.
ROWS = 64


class EvalData(Protocol):
    """Held-out text as token windows; `ryot.train.dataset.Dataset` is one."""

    @property
    def byte_lengths(self) -> NDArray[np.int64]: ...

    @property
    def corpus_sha256(self) -> str: ...

    def windows(self, split: str, count: int, length: int) -> NDArray[np.int64]: ...


class Scorer(Protocol):
    """Computes logits [B, S, V] of new tokens and the grown cache, which it takes back as `past`."""

    def run(self, ids_BS: NDArray[np.int64], past: Any = None) -> tuple[FloatArray, Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """An artifact's held-out quality, against fp32 on the same tokens."""

    tokens: int
    """Tokens that the test took."""
    loss: float
    """Nats per token."""
    bpb: float
    """Bits per byte of text."""
    bpb_ratio: float
    """`bpb` over that of fp32."""
    bpb_ratio_interval: tuple[float, float] | None
    """98 % interval of the ratio at the last look; None of a single window."""
    kl: float
    """Mean KL divergence from fp32's distribution to this artifact's, nats per token."""
    top1: float
    """Share of positions at which both hold the same token most likely."""
    depth: int = 0
    """Position up to which one long window was read through the cache; 0 where the context or the text is short."""
    depth_kl: float = 0.0
    """KL over the last positions of it."""
    answer_tokens: int = 0
    """Tokens of float32's answers to questions in the chat template; 0 where there is no template (`answers`)."""
    answer_kl: float = 0.0
    """KL over them, nats per token."""
    answers_lost: int = 0
    """Tokens among them that float32 is sure of and the artifact replaces."""

    def decides(self, limit: float) -> bool:
        """Whether the whole interval of the ratio lies on one side of `limit`."""
        if self.bpb_ratio_interval is None:
            return False
        low, high = self.bpb_ratio_interval
        return high <= limit or low > limit


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over one window."""

    tokens: int
    bits: float
    expected_nats: float
    nats: float
    kl: float
    agree: int


def quality_windows(
    data: EvalData, split: str, length: int, *, tokens: int = LOOKS[-1], window: int = WINDOW_TOKENS
) -> NDArray[np.int64]:
    """Evenly spread windows [n, T + 1] of a context of `length` that hold at least `tokens` targets, or all there are.

    In an order without a trend, so that the first ones stand for all.
    """
    size = min(length, window)
    windows = data.windows(split, -(-tokens // size), size)
    return windows[np.random.default_rng(0).permutation(len(windows))]


def evaluate_artifacts(
    reference: Scorer,
    artifacts: Mapping[str, Scorer],
    windows: NDArray[np.int64],
    byte_lengths: NDArray[np.int64],
    *,
    max_bpb_ratio: float | None = None,
) -> dict[str, Quality]:
    """The quality of each artifact on `windows` int64 [n, T + 1], and of the reference itself under `REFERENCE`.

    With a limit the test ends as soon as it is decided for all artifacts. Windows go through one at a time: dynamic
    int8 takes one activation scale for all rows of a call, and on the device a call has one row.
    """
    sums: dict[str, list[_Sums]] = {name: [] for name in (REFERENCE, *artifacts)}
    looks = {min(len(windows), -(-look // (windows.shape[1] - 1))) for look in LOOKS}
    for count, window in enumerate(windows, start=1):
        ids, targets = window[None, :-1], window[1:]
        bits = math.log(2) * float(byte_lengths[targets].sum())
        expected = reference.run(ids)[0][0]
        sums[REFERENCE].append(_compare(expected, expected, targets, bits))
        for name, artifact in artifacts.items():
            sums[name].append(_compare(expected, artifact.run(ids)[0][0], targets, bits))
        if max_bpb_ratio is None or count not in looks:
            continue
        if all(_quality(sums[name]).decides(max_bpb_ratio) for name in artifacts):
            break
    return {name: _quality(windows_of) for name, windows_of in sums.items()}


def divergence_at_depth(
    reference: Scorer, artifacts: Mapping[str, Scorer], data: EvalData, split: str, length: int
) -> tuple[int, dict[str, float]]:
    """(positions, KL of each artifact over the last of them): one long window, read in pieces through the cache.

    No positions where the context or the text is not longer than an ordinary window.
    """
    depth = min(length, DEPTH_TOKENS) // WINDOW_TOKENS * WINDOW_TOKENS
    if depth <= WINDOW_TOKENS:
        return 0, {}
    try:
        [window] = data.windows(split, 1, depth)
    except DataError:
        return 0, {}

    def last_logits(scorer: Scorer) -> FloatArray:
        past = None
        for start in range(0, depth, WINDOW_TOKENS):
            logits, past = scorer.run(window[None, start : start + WINDOW_TOKENS], past)
        last: FloatArray = logits[0]
        return last

    expected, targets = last_logits(reference), window[1 - WINDOW_TOKENS :]
    rows = slice(0, len(targets))
    return depth, {
        name: _compare(expected[rows], last_logits(artifact)[rows], targets, 1.0).kl / len(targets)
        for name, artifact in artifacts.items()
    }


def evaluate_bundle(
    path: Path, reference: Path, windows: NDArray[np.int64], byte_lengths: NDArray[np.int64], *, threads: int = 1
) -> Quality:
    """The quality of the bundle at `path` against the one at `reference`, on all token windows int64 [n, T + 1].

    Both are run through their standard graphs: of a pair that is the decode half. Raises `BundleError` for a damaged
    bundle and `ConfigError` when the two do not share their tokens.
    """
    bundles = [load_bundle(p) for p in (path, reference)]
    if bundles[0].files[TOKENIZER_NAME] != bundles[1].files[TOKENIZER_NAME]:
        raise ConfigError(
            f"reference {reference}: has another tokenizer than {path}", hint="compare artifacts of one model"
        )
    graph, expected = (StandardGraph(b.path / b.graphs["standard"], threads=threads) for b in bundles)
    return evaluate_artifacts(expected, {"artifact": graph}, windows, byte_lengths)["artifact"]


def worst(a: Quality, b: Quality) -> Quality:
    """The quality of a pair: in each figure the worse of its halves."""
    low = a if a.bpb >= b.bpb else b
    return dataclasses.replace(
        low,
        kl=max(a.kl, b.kl),
        top1=min(a.top1, b.top1),
        answer_kl=max(a.answer_kl, b.answer_kl),
        answers_lost=max(a.answers_lost, b.answers_lost),
    )


def _compare(expected_TV: FloatArray, found_TV: FloatArray, targets_T: NDArray[np.int64], bits: float) -> _Sums:
    """Sums over a window, a few positions at a time: log-probabilities of all take several times the logits' memory."""
    figures = np.zeros(4)
    for start in range(0, len(targets_T), ROWS):
        rows = slice(start, start + ROWS)
        targets = torch.from_numpy(targets_T[rows])
        expected = F.log_softmax(torch.from_numpy(expected_TV[rows]), dim=-1)
        found = F.log_softmax(torch.from_numpy(found_TV[rows]), dim=-1)
        figures += (
            F.nll_loss(expected, targets, reduction="sum").item(),
            F.nll_loss(found, targets, reduction="sum").item(),
            (expected.exp() * (expected - found)).sum().item(),
            (found.argmax(-1) == expected.argmax(-1)).sum().item(),
        )
    expected_nats, nats, kl, agree = figures.tolist()
    return _Sums(len(targets_T), bits, expected_nats, nats, kl, int(agree))


def _quality(windows: list[_Sums]) -> Quality:
    tokens, bits = sum(w.tokens for w in windows), sum(w.bits for w in windows)
    nats, expected = sum(w.nats for w in windows), sum(w.expected_nats for w in windows)
    ratio = nats / expected
    interval = None
    if len(windows) > 1:
        # A ratio of sums, linearized: its error is that of the sum of what each window leaves.
        left = [w.nats - ratio * w.expected_nats for w in windows]
        half = t_quantile(len(windows) - 1) * float(np.std(left, ddof=1)) * math.sqrt(len(windows)) / expected
        interval = (float(ratio - half), float(ratio + half))
    return Quality(
        tokens=tokens,
        loss=nats / tokens,
        bpb=nats / bits,
        bpb_ratio=ratio,
        bpb_ratio_interval=interval,
        # Two equal distributions differ by rounding, which may come out below 0.
        kl=max(0.0, sum(w.kl for w in windows) / tokens),
        top1=sum(w.agree for w in windows) / tokens,
    )
