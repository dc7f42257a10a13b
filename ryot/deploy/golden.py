"""Golden prompts: what a bundle must answer on any machine, and how sure each answer is.

A quantized form's logits depend on the CPU: kernels round activations in their own ways. How much that may change is
taken from the form itself: its logits on this CPU are compared with exact arithmetic (float32) on the same quantized
weights. Two CPUs are each about that far from the exact result, so a margin above twice that decides a token on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ryot.deploy.artifacts import ArtifactMatrices
from ryot.deploy.matrices import FloatMatrix, Matrix
from ryot.deploy.standard import StandardGraph, write_standard_graph
from ryot.deploy.weights import DecoderWeights, FloatArray
from ryot.edge.bundle import Bundle
from ryot.edge.session import Decoder as EdgeDecoder
from ryot.scratch import scratch_folder

NUM_GOLDEN = 4
#: Shares of the context that a golden prompt and its answer take.
PROMPT_SHARE, ANSWER_SHARE = 4, 8


def exact_graph(weights: DecoderWeights, matrices: Mapping[str, Matrix], folder: Path) -> StandardGraph:
    """The standard graph in float32 arithmetic on the dequantized weights, written into the new folder `folder`."""
    folder.mkdir()
    exact = {name: FloatMatrix(matrix.dequantize()) for name, matrix in matrices.items()}
    return write_standard_graph(folder, weights, exact)


def make_golden(
    bundle: Bundle,
    weights: DecoderWeights,
    form: ArtifactMatrices,
    prompts: NDArray[np.int64],
    *,
    rounding_error: float,
) -> tuple[list[dict[str, Any]], float]:
    """(golden prompts as the manifest has them, tolerance) of the graphs in `bundle`.

    `rounding_error` is what float32 alone may change in a logit. Of the held-out `prompts` [n, context] the longest
    answers whose margins are all above the tolerance are kept, at most `NUM_GOLDEN`; a model that is never that sure
    gets none.
    """
    context = weights.cfg.max_seq_len
    num_prompt, num_answer = max(1, context // PROMPT_SHARE), max(1, context // ANSWER_SHARE)
    with scratch_folder("golden") as scratch:
        exact_prefill = exact_graph(weights, form.prefill, scratch / "prefill")
        exact_decode = exact_prefill
        if form.is_pair:
            exact_decode = exact_graph(weights, form.decode, scratch / "decode")
        decoder = EdgeDecoder(bundle)
        answers = [_answer(decoder, prompt[:num_prompt], num_answer) for prompt in prompts]
        noise = 0.0
        for prompt, (tokens, logits) in zip(prompts, answers):
            first, past = exact_prefill.run(prompt[None, :num_prompt])
            rest, _ = exact_decode.run(tokens[None, :-1], past) if num_answer > 1 else (first[:, :0], past)
            exact = np.concatenate((first[0, -1:], rest[0]))
            noise = max(noise, float(np.abs(exact - logits).max()))
    tolerance = max(2 * noise, rounding_error)
    golden = []
    for prompt, (tokens, logits) in zip(prompts, answers):
        best = np.partition(logits, -2, axis=-1)[:, -2:]
        margins = best[:, 1] - best[:, 0]
        unsure = np.flatnonzero(margins <= tolerance)
        sure = int(unsure[0]) if len(unsure) else len(tokens)
        golden.append(
            {
                "ids": prompt[:num_prompt].tolist(),
                "tokens": tokens[:sure].tolist(),
                "margins": [round(float(m), 6) for m in margins[:sure]],
            }
        )
    golden.sort(key=lambda g: -len(g["tokens"]))
    return [g for g in golden[:NUM_GOLDEN] if g["tokens"]], tolerance


def _answer(decoder: EdgeDecoder, prompt: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], FloatArray]:
    """Greedy tokens [count] and the logits [count, V] that each was chosen from."""
    decoder.prefill(prompt[None])
    tokens, logits = [], []
    for i in range(count):
        if i:
            decoder.step()
        tokens.append(int(decoder.next_token[0]))
        logits.append(decoder.logits[0].copy())
    return np.asarray(tokens, dtype=np.int64), np.stack(logits)
