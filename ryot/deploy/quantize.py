"""Quantizes one decoder in the precisions asked for, by what each way of rounding costs on text.

`int8` is rounded to nearest (RTN), in blocks of the size that is fastest if that takes a small part of the loss
allowed. Otherwise in blocks of 32, or of 16 for the matrices in which they are worth their bytes, as far as that part
asks for it: blocks also decide how finely the runtime rounds a matrix's inputs (eight_bits.py). `int8-dyn` has a scale
for each token and output feature; where that takes more than a part of the loss allowed, or turns answers, the few
matrices with outliers in their inputs are those of `int8` (eight_bit_choice.py).
`int4` is the smallest mix of 4-bit matrices, rounded by GPTQ, and 8-bit ones that stays within the limit on the
validation split and in float32's answers (selection.py).

An int8 cache has one scale for a layer's keys and one for its values, with which the fused attention is fastest, where
that takes a small part of the loss allowed; elsewhere that or one scale per channel, whichever is closer to float32.
Where it costs more than the whole loss allowed, or turns answers, the cache stays in float32, and a warning says so.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ryot.deploy.answers import Answer, AnswerLoss, judge_answers
from ryot.deploy.calibration import Moments, Sensitivity, capture_moments, measure_input_sizes, measure_sensitivity
from ryot.deploy.eight_bit_choice import EightBitCosts, choose_blocks, measure_costs, outlier_mixes
from ryot.deploy.gptq import Curvature, factorize, output_errors, round_by_gptq, round_by_search, row_slices
from ryot.deploy.graph import KVScales, float_matrices, matrix_names
from ryot.deploy.mapped import put_away
from ryot.deploy.matrices import BlockMatrix, Matrix, OffsetBlockMatrix, quantize_blocks
from ryot.deploy.precisions import (
    ArtifactMatrices,
    matrix_block_size,
    num_bytes,
    pair_matrices,
    quantize_matrices,
    table_names,
)
from ryot.deploy.quality import REFERENCE, EvalData, Scorer, evaluate_artifacts, quality_windows
from ryot.deploy.scorer import TorchScorer
from ryot.deploy.selection import Ladder, Option, find_cheapest
from ryot.deploy.settings import ExportSettings
from ryot.deploy.smoothing import foldable, smooth
from ryot.deploy.standard import StandardGraph, write_standard_graph
from ryot.deploy.stored import BlockSource, repack, repack_with_offsets
from ryot.deploy.weights import DecoderWeights
from ryot.edge.bundle import KVDtype
from ryot.models.tensors import FloatArray

log = logging.getLogger(__name__)

#: Training tokens that the inputs of each matrix are observed over, in windows of at most this length.
CALIBRATION_TOKENS, CALIBRATION_WINDOW = 8_192, 256
#: Training tokens that gradients are taken over and what an option costs is judged on; not those it was made on.
COST_TOKENS = 2_048
#: Training tokens that the size of each input is averaged over.
SMOOTHING_TOKENS = 1_024
#: Validation tokens that a choice is made on.
CHOICE_TOKENS = 4_096
#: Validation tokens that the fastest blocks of 8 bits are judged on, and the share of the loss allowed, as KL, that 8
#: bits may take.
INT8_CHOICE_TOKENS, INT8_LOSS_SHARE = 512, 0.04
#: Of the KL that is found, the share that is expected: errors that meet in one place add to more.
INT8_EXPECTED_SHARE = 0.75
#: The same for one scale per token and output feature, beyond which outliers are looked for. On SmolLM2-135M, smoothed,
#: KL found over 4,096 tokens (2026-11-27): 0.0110 without, 0.0083 with 3 % of the values in blocks, 0.0067 with 8 %.
DYNAMIC_LOSS_SHARE = 0.2
#: Share of the loss allowed that a choice may use on the validation split; the test split will say something else.
CHOICE_SHARE = 0.85
#: Share of the loss allowed that a cache with few scales may take; the rest is left for the weights.
KV_LOSS_SHARE = 0.1
#: A channel's scale holds this many times the largest key or value that was seen: other text has larger ones, which
#: would be cut. On SmolLM2-135M after 2,048 tokens, keys alone rounded: KL 0.0021 without, 0.0012 so (2026-11-27).
KV_HEADROOM = 1.3
#: The smallest block that is tried at 4 bits: below it scales and zero points take over a fifth of the bytes.
SMALLEST_BLOCK = 32

Matrices = Mapping[str, Matrix]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """The matrices of an artifact and how they came about."""

    matrices: Matrices
    record: Mapping[str, object]
    """For the manifest: method, bytes; of int4 the format of each matrix and the candidates with their figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFormat:
    """How keys and values are kept."""

    scales: KVScales | None = None
    """Of an int8 cache; None keeps them in float32."""
    record: Mapping[str, object] = field(default_factory=dict)
    """For the manifest, where an int8 cache was asked for: method, candidates with their figures, why there is none."""

    @property
    def dtype(self) -> KVDtype:
        """`float32` or `int8`."""
        return "float32" if self.scales is None else "int8"


def observe_kv_scales(reference: StandardGraph, windows: NDArray[np.int64]) -> KVScales:
    """Scales with which the largest key or value of each channel over `windows` [n, length] is 127."""
    largest: dict[str, NDArray[np.float32]] = {}
    for window in windows:
        for name, cache_BKTH in reference.run(window[None])[1].items():
            peak = np.abs(cache_BKTH).max(axis=(0, 2)).reshape(-1)
            largest[name] = np.maximum(largest.get(name, np.float32(1e-6)), peak)

    def part(kind: str) -> tuple[NDArray[np.float32], ...]:
        names = [f"past_key_values.{i}.{kind}" for i in range(len(largest) // 2)]
        return tuple((largest[name] / 127).astype(np.float32) for name in names)

    return KVScales(keys=part("key"), values=part("value"))


def _widened(scales: KVScales) -> KVScales:
    """The scales with room for what was not seen."""
    keys, values = (tuple(s * np.float32(KV_HEADROOM) for s in part) for part in (scales.keys, scales.values))
    return KVScales(keys=keys, values=values)


def quantize_rtn(weights: DecoderWeights, precision: str, settings: ExportSettings) -> Quantized:
    """The matrices of a single precision, rounded to nearest."""
    matrices = quantize_matrices(weights, precision, settings)
    method = "none" if precision == "fp32" else "rtn"
    return Quantized(matrices=matrices, record={"method": method, "bytes": num_bytes(matrices)})


def smooth_for(weights: DecoderWeights, data: EvalData) -> DecoderWeights:
    """The same decoder, prepared for rounded inputs by what a little training text puts into its matrices."""
    if not foldable(weights.spec):
        return weights
    windows = quality_windows(data, "train", weights.spec.max_seq_len, tokens=SMOOTHING_TOKENS)[:, :-1]
    return smooth(weights, measure_input_sizes(weights, windows))


class Quantizer:
    """Quantizes one decoder; temporary graphs are gone from the disk as soon as they are loaded."""

    def __init__(
        self,
        weights: DecoderWeights,
        data: EvalData,
        settings: ExportSettings,
        max_bpb_ratio: float,
        scratch: Path,
        *,
        reference: Scorer | None = None,
        answers: Sequence[Answer] = (),
        source: BlockSource | None = None,
    ):
        """`reference` scores the float32 decoder, by default that of these weights; `answers` are float32's, to keep.

        With a `source` that holds matrices in 4 bits `int4` takes those; `weights` are its values, not smoothed.
        """
        self._source, self._answers = source, answers
        self.reference = reference or TorchScorer(weights)
        self._weights, self._data, self._settings = weights, data, settings
        self._limit, self._scratch = max_bpb_ratio, scratch
        self._length = weights.spec.max_seq_len
        self._made: dict[str, Quantized] = {}

    def quantize(self, precision: str) -> Quantized:
        """The matrices of a single (not paired) precision."""
        ways = {"int4": self._choose_int4, "int8": self._choose_int8, "int8-dyn": self._choose_dynamic}
        if precision not in ways:
            return quantize_rtn(self._weights, precision, self._settings)
        if precision not in self._made:
            self._made[precision] = ways[precision]()
        return self._made[precision]

    def artifact(self, precision: str, singles: Mapping[str, Quantized]) -> ArtifactMatrices:
        """The matrices of an artifact, pairs included."""
        return pair_matrices(self._weights, precision, {half: q.matrices for half, q in singles.items()})

    def graph(self, matrices: Matrices, kv_scales: KVScales | None = None) -> StandardGraph:
        """The standard graph of these matrices; its session keeps the file, which no longer has a name."""
        folder = self._scratch / "graph"
        folder.mkdir()
        try:
            return write_standard_graph(folder, self._weights, matrices, kv_scales=kv_scales)
        finally:
            shutil.rmtree(folder)

    @property
    def context(self) -> int:
        """Tokens of the decoder's context."""
        return self._length

    def choose_cache(self) -> CacheFormat:
        """The cache of the type asked for; an int8 cache's scales are chosen on validation text, weights in float32.

        In float32 all the same where no int8 cache stays within the loss allowed or keeps float32's answers.
        """
        if self._settings.kv_dtype == "float32":
            return CacheFormat()
        weights = float_matrices(self._weights)
        windows = quality_windows(self._data, "train", self._length, tokens=CALIBRATION_TOKENS)[:, :-1]
        observed = observe_kv_scales(self.graph(weights), windows)
        scales = {"per-tensor": observed.per_tensor(), "per-channel": _widened(observed)}
        candidates: dict[str, dict[str, Any]] = {}
        for method, kv_scales in scales.items():
            graph = self.graph(weights, kv_scales)
            figures, said = self._measure(graph), judge_answers(self._answers, graph)
            lost = max(figures["bpb_ratio"] - 1, figures["kl"] / figures["reference_loss"])
            candidates[method] = {"method": method, **figures, **self._told(said)}
            log.info("int8 cache: %s", candidates[method])
            allowed = self._limit - 1
            reason = said.reason(allowed * figures["reference_loss"])
            if lost > allowed:
                reason = f"KL {figures['kl']:.4f} nats and bits per byte {figures['bpb_ratio']:.4f} of fp32's"
            candidates[method]["refused"] = reason
            if lost <= KV_LOSS_SHARE * allowed and not reason:
                break
        record: dict[str, object] = {"candidates": list(candidates.values())}
        method = min(candidates, key=lambda m: (bool(candidates[m]["refused"]), candidates[m]["kl"]))
        if reason := candidates[method]["refused"]:
            log.warning("an int8 cache is not used, keys and values stay in float32: %s", reason)
            return CacheFormat(record={"method": "float32", "reason": reason, **record})
        return CacheFormat(scales=scales[method], record={"method": method, **record})

    def _choose_int8(self) -> Quantized:
        fastest = quantize_rtn(self._weights, "int8", self._settings)
        figures = self._measure(self.graph(fastest.matrices), tokens=INT8_CHOICE_TOKENS)
        candidate = {"block_size": self._settings.int8_block_size, "bytes": fastest.record["bytes"], **figures}
        log.info("int8 candidate: %s", candidate)
        allowed = INT8_LOSS_SHARE * (self._limit - 1) * figures["reference_loss"]
        if figures["kl"] <= allowed:
            return Quantized(matrices=fastest.matrices, record={**fastest.record, "candidates": [candidate]})
        del fastest
        costs = self._eight_bit_costs
        mix, expected_kl = choose_blocks(self._weights, costs, self._settings, INT8_EXPECTED_SHARE * allowed)
        matrices = {
            name: quantize_blocks(self._weights[f"{name}.weight"], bits=8, block_size=size)
            for name, size in mix.items()
        }
        record = {
            "method": "rtn",
            "bytes": num_bytes(matrices),
            "formats": {name: f"8 bits/{size}" for name, size in mix.items()},
            "expected_kl": round(expected_kl, 6),
            "candidates": [candidate],
        }
        return Quantized(matrices=matrices, record=record)

    def _choose_dynamic(self) -> Quantized:
        whole = quantize_rtn(self._weights, "int8-dyn", self._settings)
        graph = self.graph(whole.matrices)
        figures, said = self._measure(graph, tokens=INT8_CHOICE_TOKENS), judge_answers(self._answers, graph)
        del graph
        candidate = {"bytes": whole.record["bytes"], **figures, **self._told(said)}
        log.info("int8-dyn candidate: %s", candidate)
        allowed = DYNAMIC_LOSS_SHARE * (self._limit - 1) * figures["reference_loss"]
        if figures["kl"] <= allowed and not said.reason(allowed):
            return Quantized(matrices=whole.matrices, record={**whole.record, "candidates": [candidate]})
        # The blocks of int8, which a pair of both has only once.
        blocks = self.quantize("int8").matrices
        bits = self._settings.dynamic_bits
        for outliers, expected_kl in outlier_mixes(self._weights, self._eight_bit_costs, bits, blocks):
            matrices = {**whole.matrices, **{name: blocks[name] for name in ("embedding", *outliers)}}
            said = judge_answers(self._answers, self.graph(matrices))
            record = {
                "method": "rtn",
                "bytes": num_bytes(matrices),
                "in_blocks": outliers,
                "expected_kl": round(expected_kl, 6),
                **self._told(said),
                "candidates": [candidate],
            }
            log.info("int8-dyn candidate: %s", record)
            if not said.reason((self._limit - 1) * figures["reference_loss"]):
                break
        return Quantized(matrices=matrices, record=record)

    @functools.cached_property
    def _eight_bit_costs(self) -> EightBitCosts:
        return measure_costs(self._weights, self._data)

    def _choose_int4(self) -> Quantized:
        ladder = Ladder(self._options())
        candidates: list[dict[str, object]] = []

        def measure(rung: int) -> float:
            mix = ladder.mix(rung)
            graph = self.graph({name: option.matrix for name, option in mix.items()})
            figures, said = self._measure(graph), judge_answers(self._answers, graph)
            counts = Counter(option.label for option in mix.values())
            candidates.append(
                {
                    "bytes": ladder.price(rung),
                    "formats": dict(sorted(counts.items())),
                    "expected_kl": round(ladder.expected_kl(rung), 6),
                    **figures,
                    **self._told(said),
                }
            )
            log.info("int4 candidate: %s", candidates[-1])
            # Over few tokens the KL is the steadier measure of how much the loss must grow, of text and of answers.
            lost = max(figures["bpb_ratio"] - 1, max(figures["kl"], said.kl) / figures["reference_loss"])
            return max(lost, self._limit - 1) if said.lost else lost

        rung = find_cheapest(ladder, measure, CHOICE_SHARE * (self._limit - 1))
        mix = ladder.mix(rung)
        record = {
            "method": "gptq",
            "bytes": ladder.price(rung),
            "formats": {name: option.label for name, option in mix.items()},
            "candidates": candidates,
        }
        return Quantized(matrices={name: option.matrix for name, option in mix.items()}, record=record)

    def _options(self) -> dict[str, list[Option]]:
        """The ways to round each matrix, in the order of `matrix_names`; what the source has rounded stays so."""
        names = matrix_names(self._weights)
        options = self._stored_options(names)
        if len(options) == len(names):
            return options
        tokens = CALIBRATION_TOKENS + COST_TOKENS
        windows = quality_windows(self._data, "train", self._length, tokens=tokens, window=CALIBRATION_WINDOW)[:, :-1]
        num_cost = max(1, len(windows) * COST_TOKENS // tokens)
        cost, fit = windows[:num_cost], windows[num_cost:]
        sensitivity = measure_sensitivity(self._weights, cost)

        def round_matrix(name: str, moments: Moments) -> None:
            if name not in options:
                log.debug("int4: rounding %s", name)
                curvature = factorize(moments.fit_KK, fit.size)
                options[name] = self._options_of(name, sensitivity, curvature, moments.cost_KK)

        capture_moments(self._weights, fit, cost, sensitivity.tokens, round_matrix)
        for name in names:
            if name not in options:  # a table that is only looked up: no product, no inputs
                options[name] = self._options_of(name, sensitivity, None, None)
        return {name: options[name] for name in names}

    def _stored_options(self, names: list[str]) -> dict[str, list[Option]]:
        """The matrices that the source holds in 4 bits; its tables in 8 bits too if all others are in 4."""
        if self._source is None:
            return {}
        tables = table_names(self._weights)
        found: dict[str, BlockMatrix | OffsetBlockMatrix] = {}
        for name in names:
            stored = self._source.blocks(name)
            matrix = stored and (repack(stored) or (None if name in tables else repack_with_offsets(stored)))
            if matrix:
                found[name] = matrix
        four = [name for name, m in found.items() if isinstance(m, OffsetBlockMatrix) or m.bits == 4]
        kept = found if set(four) >= set(names) - set(tables) else four
        return {
            name: [Option(label="as stored", price=found[name].num_bytes, expected_kl=0.0, matrix=found[name])]
            for name in kept
        }

    def _options_of(
        self, name: str, sensitivity: Sensitivity, curvature: Curvature | None, moments_KK: Tensor | None
    ) -> list[Option]:
        values = self._weights[f"{name}.weight"]

        def option(matrix: BlockMatrix) -> Option:
            cost = 0.0
            if moments_KK is not None:
                cost += sensitivity.product_cost(name, output_errors(values, matrix, moments_KK))
            if name == "embedding":
                for rows in row_slices(len(values)):
                    errors = torch.from_numpy(matrix.rows(rows).dequantize() - values[rows])
                    cost += sensitivity.lookup_cost(errors, rows)
            return Option(
                expected_kl=cost,
                label=f"{matrix.bits} bits/{matrix.block_size}",
                price=matrix.num_bytes,
                # Of most matrices all options but one come to nothing.
                matrix=dataclasses.replace(matrix, codes_NCE=put_away(matrix.codes_NCE, self._scratch)),
            )

        fit = functools.partial(matrix_block_size, self._weights, name)
        sizes = dict.fromkeys(fit(size) for size in (self._settings.int4_block_size, SMALLEST_BLOCK))
        formats = [(4, size) for size in sizes] + [(8, fit(self._settings.int8_block_size))]
        return [option(_round(values, curvature, bits, block_size)) for bits, block_size in formats]

    def _told(self, said: AnswerLoss) -> dict[str, object]:
        """What a record says of answers, where any were asked for."""
        return {"answer_kl": round(said.kl, 6), "answers_lost": said.lost} if self._answers else {}

    def _measure(self, graph: StandardGraph, *, tokens: int = CHOICE_TOKENS) -> dict[str, float]:
        """The figures that a candidate is chosen by."""
        windows = quality_windows(self._data, "val", self._length, tokens=tokens)
        found = evaluate_artifacts(self.reference, {"artifact": graph}, windows, self._data.byte_lengths)
        figures = {name: round(getattr(found["artifact"], name), 6) for name in ("bpb_ratio", "kl", "top1", "tokens")}
        return {**figures, "reference_loss": round(found[REFERENCE].loss, 6)}


def _round(values_NK: FloatArray, curvature: Curvature | None, bits: int, block_size: int) -> BlockMatrix:
    """4 bits by GPTQ where the matrix has inputs; 8 bits are so fine that RTN does, with the zero in the middle."""
    if bits == 4 and curvature is not None:
        return round_by_gptq(values_NK, curvature, bits=bits, block_size=block_size)
    energy_K = None if curvature is None else curvature.moments_KK.diagonal()
    return round_by_search(values_NK, energy_K, bits=bits, block_size=block_size, asymmetric=bits == 4)
