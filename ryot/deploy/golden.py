"""Golden prompts: what a bundle must answer on any machine, and how sure each answer is.

A quantized artifact's logits depend on the CPU: kernels round activations in their own ways. How much that may change
is taken from the artifact itself: its logits on this CPU are compared with exact arithmetic (float32) on the same
quantized weights, as distances of a position's likeliest tokens from the one it chose: an error that all logits share
changes no token, and those of tokens far below do not either. Two CPUs are each about that far from the exact result,
so a margin above twice that decides a token on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ryot.deploy.matrices import Matrix
from ryot.deploy.memory import give_back_memory
from ryot.deploy.precisions import ArtifactMatrices
from ryot.deploy.reference import Load, Piece, layerwise_logits
from ryot.deploy.weights import DecoderWeights
from ryot.edge.bundle import Bundle
from ryot.edge.session import OnnxruntimeEngine
from ryot.models.tensors import FloatArray

#: Answers that are kept, and prompts that are tried for them.
NUM_GOLDEN, NUM_CANDIDATES = 4, 8
#: Shares of the context that a golden prompt and its answer take, and how many tokens at most: a device checks them.
PROMPT_SHARE, ANSWER_SHARE = 4, 8
MAX_PROMPT, MAX_ANSWER = 32, 16
#: Tokens after which a prompt begins anew, where it does.
PERIOD = 8
#: Of a position's logits the largest, whose order could change.
NUM_RIVALS = 16


def make_golden(
    bundle: Bundle,
    weights: DecoderWeights,
    artifact: ArtifactMatrices,
    prompts: NDArray[np.int64],
    *,
    rounding_error: float,
) -> tuple[list[dict[str, object]], float]:
    """(golden prompts as the manifest has them, tolerance) of the graphs in `bundle`.

    `rounding_error` is what float32 alone may change in a logit. Of the held-out `prompts` [n, context] the longest
    answers whose margins are all above the tolerance are kept, at most `NUM_GOLDEN`; a model that is never that sure
    gets none.
    """
    prompts = prompts[:NUM_CANDIDATES]
    if not len(prompts):
        return [], rounding_error
    context = weights.spec.max_seq_len
    num_prompt = max(1, min(MAX_PROMPT, context // PROMPT_SHARE))
    num_answer = max(1, min(MAX_ANSWER, context // ANSWER_SHARE))
    # A text that goes round is what a model is surest of.
    asked = [prompt[:num_prompt] for prompt in prompts] + [np.resize(prompt[:PERIOD], num_prompt) for prompt in prompts]
    answers = _answers(OnnxruntimeEngine(bundle), asked, num_answer)
    give_back_memory()
    # Teacher-forced: each token of an answer is followed by the next logits.
    fed = [np.stack(asked), np.stack([tokens[:-1] for tokens, _ in answers])]
    loads = (_dequantized(weights, artifact.prefill), _dequantized(weights, artifact.decode))
    pieces = [Piece(ids, load) for ids, load in zip(fed, loads) if ids.size]
    first, *rest = layerwise_logits(weights.spec, pieces, torch.float32)
    exact = torch.cat((first[:, -1:], *rest), dim=1).numpy()
    noise = max(_distance_error(logits, row) for row, (_, logits) in zip(exact, answers))
    tolerance = max(2 * noise, rounding_error)
    golden = []
    for prompt, (tokens, logits) in zip(asked, answers):
        best = np.partition(logits, -2, axis=-1)[:, -2:]
        margins = best[:, 1] - best[:, 0]
        unsure = np.flatnonzero(margins <= tolerance)
        sure = int(unsure[0]) if len(unsure) else len(tokens)
        golden.append(
            {
                "ids": prompt.tolist(),
                "tokens": tokens[:sure].tolist(),
                "margins": [round(float(m), 6) for m in margins[:sure]],
            }
        )
    golden.sort(key=lambda g: -len(g["tokens"]))
    return [g for g in golden[:NUM_GOLDEN] if g["tokens"]], tolerance


def _distance_error(found_TV: FloatArray, exact_TV: FloatArray) -> float:
    """By how much the distance of a rival from the token that was chosen is off, at most."""
    last = -min(NUM_RIVALS, found_TV.shape[-1])
    # What is likely in either: a token that was found far below by mistake alone may be another machine's choice.
    likely = [np.argpartition(logits, last, axis=-1)[:, -NUM_RIVALS:] for logits in (found_TV, exact_TV)]
    rivals_TR = np.concatenate(likely, axis=-1)
    chosen_T1 = found_TV.argmax(axis=-1, keepdims=True)
    found_TR, exact_TR = (
        np.take_along_axis(logits, chosen_T1, -1) - np.take_along_axis(logits, rivals_TR, -1)
        for logits in (found_TV, exact_TV)
    )
    return float(np.abs(found_TR - exact_TR).max())


def _dequantized(weights: DecoderWeights, matrices: Mapping[str, Matrix]) -> Load:
    """The decoder's arrays, its matrices as the runtime multiplies with them."""

    def load(name: str) -> FloatArray:
        matrix = matrices.get(name.removesuffix(".weight"))
        return weights[name] if matrix is None else matrix.dequantize()

    return load


def _answers(
    decoder: OnnxruntimeEngine, asked: Sequence[NDArray[np.int64]], count: int
) -> list[tuple[NDArray[np.int64], FloatArray]]:
    """The answer to each prompt; the decoder and its weights are gone when this returns."""
    return [_answer(decoder, prompt, count) for prompt in asked]


def _answer(decoder: OnnxruntimeEngine, prompt: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Greedy tokens [count] and the logits [count, V] that each was chosen from."""
    decoder.prefill(prompt[None])
    tokens, logits = [], []
    for i in range(count):
        if i:
            decoder.step()
        tokens.append(int(decoder.next_token[0]))
        logits.append(decoder.logits[0].copy())
    return np.asarray(tokens, dtype=np.int64), np.stack(logits)
