"""Choosing the next token from logits: exact semantics, one reference, and a faster way to the same candidates.

The order is that of transformers' `generate`: repetition penalty, temperature, then three cuts, top-k, top-p and
min-p, then a draw. Every cut keeps a head of the tokens sorted by probability (equal ones: lower id first), so a
choice is described by how many tokens are kept; the order of the cuts matters only in that top-p looks at the
probabilities that top-k left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ryot.edge.sampling_params import SamplingParams
from ryot.errors import BundleError

#: Tokens that are sorted first; a trained model's draw nearly always falls among them.
HEAD = 128


class Sampler:
    """Draws the tokens of one sequence; row `row` of a batch has a random stream of its own."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], *, row: int = 0):
        self.params = params
        self._rng = np.random.default_rng([params.seed, row])
        self._seen = set(prompt_ids)

    def choose(self, logits_V: np.ndarray) -> int:
        """The next token; it counts as seen from now on."""
        params = self.params
        if np.isnan(logits_V.max()):
            raise BundleError("the model's logits are not numbers (NaN); its weights are damaged")
        if params.repetition_penalty != 1:
            logits_V = penalize_repetition(logits_V, sorted(self._seen), params.repetition_penalty)
        if params.temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = choose_token(logits_V, params, self._rng.random())
        self._seen.add(token)
        return token


def penalize_repetition(logits_V: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """A copy of the logits in which those of `seen` are less likely by `penalty` (Keskar et al. 2019, CTRL)."""
    result = logits_V.copy()
    chosen = logits_V[list(seen)]
    result[list(seen)] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return result


def reference_choice(logits_V: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """The id at the point `uniform`, from 0 to below 1, of the cut distribution: the definition, by sorting all."""
    order = np.argsort(-logits_V, kind="stable")[: params.top_k or None]
    probabilities = _probabilities(logits_V, order, params)
    cumulative = probabilities.cumsum()
    keep = min(_kept(probabilities, cumulative, params), order.size)
    mass = cumulative[keep - 1] if keep < order.size else 1.0
    return _at(order[:keep], cumulative[:keep], uniform * mass)


def choose_token(logits_V: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """The same as `reference_choice`, bit for bit; only the best `HEAD` tokens are sorted where they decide."""
    head = min(params.top_k or HEAD, HEAD)
    if logits_V.size <= head or params.top_k > head:
        return reference_choice(logits_V, params, uniform)
    order = _best(logits_V, head)
    probabilities = _probabilities(logits_V, order, params)
    cumulative = probabilities.cumsum()
    keep = _kept(probabilities, cumulative, params)
    if keep < head or (keep == head and not params.top_k):
        # The cuts fall inside the head, so nothing behind it matters.
        return _at(order[:keep], cumulative[:keep], uniform * cumulative[keep - 1])
    if params.top_k:
        return _at(order, cumulative, uniform)
    nothing_is_cut = params.top_p >= 1 and params.min_p == 0
    if nothing_is_cut and uniform < cumulative[-1]:
        return _at(order, cumulative, uniform)
    return reference_choice(logits_V, params, uniform)


def _best(logits_V: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k best logits, best first; equal ones by lower id, as a stable sort of all would have them."""
    threshold = np.partition(logits_V, logits_V.size - k)[logits_V.size - k]
    above = np.flatnonzero(logits_V > threshold)
    equal = np.flatnonzero(logits_V == threshold)[: k - above.size]
    return np.concatenate([above[np.argsort(-logits_V[above], kind="stable")], equal])


def _probabilities(logits_V: np.ndarray, order: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The probabilities of the tokens `order` among those that top-k leaves: `order` itself, or all without top-k.

    The sum is taken in the order of ids, so that it does not depend on how far anyone sorted.
    """
    if not params.top_k:
        weights_V = _weights(logits_V, params.temperature)
        return weights_V[order] / weights_V.sum()
    by_id = np.argsort(order)
    weights = np.empty(order.size)
    weights[by_id] = ascending = _weights(logits_V[order[by_id]], params.temperature)
    return weights / ascending.sum()


def _weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    """exp of the scaled logits in float64, the best one being 1."""
    logits = logits.astype(np.float64)
    return np.exp((logits - logits.max()) / temperature)


def _kept(probabilities: np.ndarray, cumulative: np.ndarray, params: SamplingParams) -> int:
    """How many of the tokens, sorted by probability, top-p and min-p keep: at least 1; more than given if all stay."""
    keep = probabilities.size + 1
    if params.top_p < 1:
        # A token is kept while those before it add up to less than top_p.
        keep = min(keep, int(np.searchsorted(cumulative, params.top_p, side="left")) + 1)
    if params.min_p > 0:
        stay = int(np.count_nonzero(probabilities >= params.min_p * probabilities[0]))
        keep = min(keep, stay if stay < probabilities.size else keep)
    return keep


def _at(order: np.ndarray, cumulative: np.ndarray, point: float) -> int:
    """The id whose stretch of the cumulative distribution holds `point`; the last one where rounding leaves a gap."""
    index = int(np.searchsorted(cumulative, point, side="right"))
    return int(order[min(index, order.size - 1)])
