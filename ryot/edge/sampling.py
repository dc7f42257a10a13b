"""Choosing the next token from logits: exact semantics, one reference, and a faster way to the same candidates.

The order is that of transformers' `generate`: repetition penalty, temperature, then three cuts, top-k, top-p and
min-p, then a draw; a bias of tokens, OpenAI's penalties and a mask come before the temperature. Every cut keeps a head
of the tokens sorted by probability (equal ones: lower id first), so a choice is described by how many tokens are kept;
the order of the cuts matters only in that top-p looks at the probabilities that top-k left. Where nothing is cut there
is nothing to sort: the draw is taken in the order of ids, and of many rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ryot.edge.sampling_params import SamplingParams
from ryot.errors import BundleError

#: Tokens that are sorted first; a trained model's draw nearly always falls among them.
HEAD = 128
#: Tokens that are sorted where those are too few: a tenth of the time that sorting 49,152 takes.
WIDE_HEAD = 2048
#: Ids whose weights are summed together where one is drawn among all.
_STRETCH = 128
#: Random numbers made at a time.
_POINTS = 32
#: A smaller temperature is 0 in float32, and a logit beyond the largest number is none.
SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
LARGEST_LOGIT = float(np.finfo(np.float32).max)


class Sampler:
    """Draws the tokens of one sequence; row `row` of a batch has a random stream of its own."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], *, row: int = 0):
        self.params = params
        self._rng = np.random.default_rng([params.seed, row])
        self._seen = set(prompt_ids)
        self._counts: dict[int, int] = {}
        #: Points that were drawn and not yet asked for, the next one last.
        self._points: list[float] = []

    def choose(self, logits_V: np.ndarray, allowed_V: np.ndarray | None = None) -> int:
        """The next token, one of those `allowed_V` where given; it counts as seen from now on."""
        params = self.params
        if np.isnan(logits_V.max()):
            raise BundleError("the model's logits are not numbers (NaN); its weights are damaged")
        if params.changes_logits:
            logits_V = self._changed(logits_V)
        if allowed_V is not None:
            logits_V = np.where(allowed_V, logits_V, -np.inf)
        if params.temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = choose_token(logits_V, params, self.draw())
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def draw(self) -> float:
        """The point, from 0 to below 1, of the next token."""
        if not self._points:
            # The same numbers as one by one, for less.
            self._points = self._rng.random(_POINTS)[::-1].tolist()
        return self._points.pop()

    def _changed(self, logits_V: np.ndarray) -> np.ndarray:
        """A copy of the logits with the penalties and the bias."""
        params = self.params
        logits_V = penalize_repetition(logits_V, sorted(self._seen), params.repetition_penalty)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            counts = np.fromiter(self._counts.values(), np.float32)
            logits_V[list(self._counts)] -= params.presence_penalty + params.frequency_penalty * counts
        for token, bias in params.logit_bias:
            logits_V[token] += bias
        return logits_V


def penalize_repetition(logits_V: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """A copy of the logits in which those of `seen` are less likely by `penalty` (Keskar et al. 2019, CTRL)."""
    result = logits_V.copy()
    chosen = logits_V[list(seen)]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        changed = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    result[list(seen)] = changed.clip(-LARGEST_LOGIT, LARGEST_LOGIT)
    return result


def draw_uncut(
    logits_RV: np.ndarray, temperature_R: np.ndarray, uniform_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the id at its point of the distribution, ids in their order, and the logarithm of its probability.

    The logarithm is that of the probability with which it was drawn, temperature included.
    """
    R, V = logits_RV.shape
    C = -(-V // _STRETCH)
    best_R = logits_RV.max(axis=1)
    # Weights in float32, a fourth of the time. What is summed in float32 is one stretch of ids; the sums of stretches
    # are added in float64, for thousands of small ones must not be lost. Ids past the end have no weight.
    weights_RCE = np.zeros((R, C, _STRETCH), np.float32)
    weights_RV = weights_RCE.reshape(R, -1)[:, :V]
    np.subtract(logits_RV, best_R[:, None], out=weights_RV)
    if (temperature_R != 1).any():
        temperature_R = np.maximum(temperature_R, SMALLEST_TEMPERATURE)
        with np.errstate(over="ignore"):
            weights_RV /= temperature_R[:, None].astype(np.float32)
    np.exp(weights_RV, out=weights_RV)
    rows_R = np.arange(R)
    up_to_RC = weights_RCE.sum(axis=2).cumsum(axis=1, dtype=np.float64)
    total_R = up_to_RC[:, -1]
    # An id's share is what lies above the sum before it, up to its own; one of no width is never met.
    point_R = uniform_R * total_R
    stretch_R = (up_to_RC <= point_R[:, None]).sum(axis=1)
    inside_RE = weights_RCE[rows_R, stretch_R].cumsum(axis=1, dtype=np.float64)
    before_R = np.where(stretch_R > 0, up_to_RC[rows_R, stretch_R - 1], 0.0)
    share_R = (point_R - before_R) / (up_to_RC[rows_R, stretch_R] - before_R)
    # The two sums of a stretch differ by rounding; the point keeps its place between the stretch's ends.
    last_R = inside_RE.argmax(axis=1)
    inner_R = np.minimum((inside_RE <= (share_R * inside_RE[:, -1])[:, None]).sum(axis=1), last_R)
    ids_R = stretch_R * _STRETCH + inner_R
    chosen_R = logits_RV[rows_R, ids_R].astype(np.float64)
    return ids_R, (chosen_R - best_R) / temperature_R - np.log(total_R)


def reference_choice(logits_V: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """The id at the point `uniform`, from 0 to below 1, of the cut distribution: the definition, by sorting all."""
    if params.uncut:
        return _draw_one(logits_V, params, uniform)
    order = np.argsort(-logits_V, kind="stable")[: params.top_k or None]
    probabilities = _probabilities(logits_V, order, params)
    cumulative = probabilities.cumsum()
    keep = min(_kept(probabilities, cumulative, params), order.size)
    mass = cumulative[keep - 1] if keep < order.size else 1.0
    return _at(order[:keep], cumulative[:keep], uniform * mass)


def choose_token(logits_V: np.ndarray, params: SamplingParams, uniform: float) -> int:
    """The same as `reference_choice`, bit for bit; only the best tokens are sorted where they decide."""
    if params.uncut:
        return _draw_one(logits_V, params, uniform)
    for size in (HEAD, WIDE_HEAD):
        head = min(params.top_k or size, size)
        if head < logits_V.size and params.top_k <= head:
            token = _choose_from_head(logits_V, params, uniform, head)
            if token is not None:
                return token
    return reference_choice(logits_V, params, uniform)


def _draw_one(logits_V: np.ndarray, params: SamplingParams, uniform: float) -> int:
    return int(draw_uncut(logits_V[None], np.array([params.temperature]), np.array([uniform]))[0][0])


def _choose_from_head(logits_V: np.ndarray, params: SamplingParams, uniform: float, head: int) -> int | None:
    """The choice as far as the `head` best tokens tell; None where others may matter."""
    order = _best(logits_V, head)
    probabilities = _probabilities(logits_V, order, params)
    cumulative = probabilities.cumsum()
    keep = _kept(probabilities, cumulative, params)
    if keep < head or (keep == head and not params.top_k):
        # The cuts fall inside the head, so nothing behind it matters.
        return _at(order[:keep], cumulative[:keep], uniform * cumulative[keep - 1])
    return _at(order, cumulative, uniform) if params.top_k else None


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
        chosen: np.ndarray = weights_V[order] / weights_V.sum()
        return chosen
    by_id = np.argsort(order)
    weights = np.empty(order.size)
    weights[by_id] = ascending = _weights(logits_V[order[by_id]], params.temperature)
    shares: np.ndarray = weights / ascending.sum()
    return shares


def _weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    """exp of the scaled logits in float64, the best one being 1."""
    logits = logits.astype(np.float64)
    weights: np.ndarray = np.exp((logits - logits.max()) / temperature)
    return weights


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
