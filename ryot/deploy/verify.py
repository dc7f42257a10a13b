"""The parity gate: the fp32 graphs against torch, by a tolerance that is derived, not guessed.

Two correct float32 programs differ by rounding: each is off from the exact result by an error of the same order.
The error of torch's own float32 result is measured against torch in float64 on the same tokens, and a graph may be
off by `SAFETY` times that. Greedy tokens must be equal as long as the reference's two best logits are further apart
than that tolerance; from the first position on where they are not, either token is right.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ryot.deploy.memory import give_back_memory
from ryot.deploy.reference import decoder_logits
from ryot.deploy.standard import Past, StandardGraph
from ryot.edge.bundle import load_bundle
from ryot.edge.session import OnnxruntimeEngine
from ryot.errors import QualityError
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import FloatArray
from ryot.train.model import Decoder

#: How many times further off than torch's float32 a graph may be. The sums have other orders and the exponential and
#: the error function other polynomials; over random and trained weights of both architectures 1 to 4 was seen.
SAFETY = 16
#: Rows and tokens that parity is checked on, at most.
PARITY_ROWS = 4
PARITY_TOKENS = 256
#: Logits that the check holds at a time, at most, as long as that leaves a few tokens.
PARITY_LOGITS, MIN_PARITY_TOKENS = 8_000_000, 32


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityResult:
    """What the gate found; it passed if it was returned."""

    max_difference: float
    """Largest difference of a logit, over prefill and cached decode."""
    tolerance: float
    """What it may be."""
    torch_error: float
    """Largest error of torch's float32 logits against float64: `tolerance` is `SAFETY` times this."""
    tokens_compared: int
    """Greedy tokens that had to be equal and were."""
    tokens_total: int


def parity_size(spec: DecoderSpec) -> tuple[int, int]:
    """Rows and tokens that parity is checked on: fewer tokens where a large vocabulary makes many logits of each."""
    tokens = max(MIN_PARITY_TOKENS, PARITY_LOGITS // (PARITY_ROWS * spec.vocab_size))
    return PARITY_ROWS, min(spec.max_seq_len, PARITY_TOKENS, tokens)


def check_parity(model: Decoder, bundle_path: Path, windows: NDArray[np.int64]) -> ParityResult:
    """Compare the fp32 bundle at `bundle_path` with `model` on token windows int64 [n, context or more].

    Prefill with an empty cache, cached decode at several past lengths, batches of one and more, and the greedy tokens
    of the fast graph. Raises `QualityError` naming the first part that is off.
    """
    rows, length = parity_size(model.spec)
    ids_BT = windows[:rows, :length]
    expected, torch_error = reference_logits(model, ids_BT)
    tolerance = SAFETY * torch_error
    give_back_memory()
    # One session at a time, and no second copy of its weights: a large model is there already.
    graph = StandardGraph(bundle_path / load_bundle(bundle_path, verify=False).graphs["standard"], prepack=False)
    difference = 0.0
    for edges in _edges(ids_BT.shape[1]):
        # With a cache the fused attention takes one new token of each row, or several of one row.
        single = any(b - a > 1 for a, b in itertools.pairwise(edges[1:]))
        some = slice(0, 1) if single else slice(None)
        found = _run_in_pieces(graph, ids_BT[some], edges)
        off = float(np.abs(found - expected[some, : edges[-1]]).max())
        if not off <= tolerance:
            raise QualityError(
                f"parity: logits of {bundle_path.name} differ from torch by {off:.3g} with the text cut at {edges}, "
                f"expected at most {tolerance:.3g} ({SAFETY} times torch's own float32 error)",
                hint="this is a bug in the graph or in onnxruntime's kernels on this CPU; report it with this message",
            )
        difference = max(difference, off)
    del graph
    give_back_memory()
    compared, total = check_greedy_tokens(model, bundle_path, ids_BT, tolerance)
    return ParityResult(
        max_difference=difference,
        tolerance=tolerance,
        torch_error=torch_error,
        tokens_compared=compared,
        tokens_total=total,
    )


@torch.no_grad()
def reference_logits(model: Decoder, ids_BT: NDArray[np.int64]) -> tuple[FloatArray, float]:
    """Torch's float32 logits [B, T, V], and their largest error against float64."""
    single = model(torch.from_numpy(ids_BT))
    exact = decoder_logits(model, ids_BT, torch.float64)
    # A model whose logits happen to be exact still rounds once where it stores them.
    floor = torch.finfo(torch.float32).eps * float(exact.abs().max())
    return single.numpy(), max(float((single - exact).abs().max()), floor)


def check_greedy_tokens(
    model: Decoder, bundle_path: Path, ids_BT: NDArray[np.int64], tolerance: float
) -> tuple[int, int]:
    """(tokens that were equal, tokens made) of greedy decoding to the end of the context from half of it.

    Raises `QualityError` at a token that differs although the reference's margin is above the tolerance.
    """
    prompt = ids_BT[:, : max(1, ids_BT.shape[1] // 2)]
    new = ids_BT.shape[1] - prompt.shape[1]
    expected, margins = greedy(model, prompt, new)
    give_back_memory()
    decoder = OnnxruntimeEngine(load_bundle(bundle_path, verify=False), batch_size=len(prompt), prepack=False)
    found = decode_greedy(decoder, prompt, new)
    compared = 0
    for row in range(len(prompt)):
        unsure = np.flatnonzero(margins[row] <= tolerance)
        end = int(unsure[0]) if len(unsure) else new
        wrong = np.flatnonzero(found[row, :end] != expected[row, :end])
        if len(wrong):
            at = int(wrong[0])
            raise QualityError(
                f"parity: token {at} after prompt {row} of {bundle_path.name} is {found[row, at]}, torch says "
                f"{expected[row, at]} with a margin of {margins[row, at]:.3g} (tolerance {tolerance:.3g})"
            )
        compared += end
    return compared, expected.size


@torch.no_grad()
def greedy(model: Decoder, prompt_BS: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Torch's greedy tokens [B, count] and the margin between the two best logits at each."""
    logits, past = model.forward_cached(torch.from_numpy(prompt_BS), None)
    tokens, margins = [], []
    for i in range(count):
        best = logits[:, -1].topk(2)
        tokens.append(best.indices[:, :1])
        margins.append(best.values[:, :1] - best.values[:, 1:])
        if i + 1 < count:
            logits, past = model.forward_cached(tokens[-1], past)
    return torch.cat(tokens, dim=1).numpy(), torch.cat(margins, dim=1).numpy()


def decode_greedy(decoder: OnnxruntimeEngine, prompt_BS: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The bundle's greedy tokens [B, count]."""
    decoder.prefill(prompt_BS)
    tokens = [list(decoder.next_token)]
    for _ in range(count - 1):
        decoder.step()
        tokens.append(list(decoder.next_token))
    return np.array(tokens, dtype=np.int64).T


def _edges(length: int) -> list[list[int]]:
    """Ends of the pieces that a window goes through in: whole, then with caches of several lengths."""
    half = length // 2
    ways = [
        [0, length],
        [0, 1, 2, 3, half + 1, length],
        [0, half, *range(half + 1, half + 5)],
        [0, length - 1, length],
    ]
    return [sorted({min(edge, length) for edge in edges}) for edges in ways]


def _run_in_pieces(graph: StandardGraph, ids_BT: NDArray[np.int64], edges: list[int]) -> FloatArray:
    """Logits of the positions up to the last edge, fed piece by piece."""
    past: Past | None = None
    parts = []
    for start, end in itertools.pairwise(edges):
        logits, past = graph.run(ids_BT[:, start:end], past)
        parts.append(logits)
    return np.concatenate(parts, axis=1)
