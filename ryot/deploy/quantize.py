"""Quantizes one decoder in the precisions asked for, by what each way of rounding costs on text.

`int8-dyn` is rounded to nearest, and so is `int8`, in blocks of the size that is fastest if that takes a small part of
the loss allowed and of the smallest otherwise: blocks also decide how finely the runtime rounds a matrix's inputs.
`int4` is the smallest mix of 4- and 8-bit matrices, rounded by GPTQ, that stays within the limit on the validation
split (selection.py).

An int8 cache has one scale for a layer's keys and one for its values, with which the fused attention is fastest, where
that takes a small part of the loss allowed; elsewhere that or a scale a channel, whichever is closer to float32.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ryot.config import replace
from ryot.deploy.calibration import Moments, Sensitivity, capture_moments, measure_input_sizes, measure_sensitivity
from ryot.deploy.gptq import Curvature, factorize, output_errors, round_by_gptq, round_by_search, row_slices
from ryot.deploy.graph import KVScales, float_matrices, matrix_names
from ryot.deploy.mapped import put_away
from ryot.deploy.matrices import BlockMatrix, Matrix, OffsetBlockMatrix
from ryot.deploy.precisions import ArtifactMatrices, num_bytes, pair_matrices, quantize_matrices, table_names
from ryot.deploy.quality import REFERENCE, EvalData, Scorer, evaluate_artifacts, quality_windows
from ryot.deploy.scorer import TorchScorer
from ryot.deploy.selection import Ladder, Option, find_smallest
from ryot.deploy.settings import ExportSettings
from ryot.deploy.smoothing import foldable, smooth
from ryot.deploy.standard import StandardGraph, write_standard_graph
from ryot.deploy.stored import BlockSource, repack, repack_with_offsets
from ryot.deploy.weights import DecoderWeights
from ryot.models.block_sizes import block_size_for
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
#: Validation tokens that the block size of 8 bits is chosen on, and the share of the loss allowed, as KL, that the
#: fastest one may take.
INT8_CHOICE_TOKENS, INT8_LOSS_SHARE = 1_024, 0.04
#: Share of the loss allowed that a choice may use on the validation split; the test split will say something else.
CHOICE_SHARE = 0.85
#: Share of the loss allowed that a cache with few scales may take; the rest is left for the weights.
KV_LOSS_SHARE = 0.1
#: The smallest block that is tried: below it scales and zero points take over a fifth of the bytes.
SMALLEST_BLOCK = 32

Matrices = Mapping[str, Matrix]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """The matrices of an artifact and how they came about."""

    matrices: Matrices
    record: Mapping[str, Any]
    """For the manifest: method, bytes; of int4 the format of each matrix and the candidates with their figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFormat:
    """How keys and values are kept."""

    scales: KVScales | None = None
    """Of an int8 cache; None keeps them in float32."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest, of an int8 cache: method, candidates with their figures."""

    @property
    def dtype(self) -> str:
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
        source: BlockSource | None = None,
    ):
        """`reference` scores the float32 decoder, by default the one of these weights.

        With a `source` that holds matrices in 4 bits `int4` takes those; `weights` are its values, not smoothed.
        """
        self._source = source
        self.reference = reference or TorchScorer(weights)
        self._weights, self._data, self._settings = weights, data, settings
        self._limit, self._scratch = max_bpb_ratio, scratch
        self._length = weights.spec.max_seq_len

    def quantize(self, precision: str) -> Quantized:
        """The matrices of a single (not paired) precision."""
        if precision == "int4":
            return self._choose_int4()
        if precision == "int8":
            return self._choose_int8()
        return quantize_rtn(self._weights, precision, self._settings)

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
        """The cache of the type asked for; an int8 cache's scales are chosen on validation text, weights in float32."""
        if self._settings.kv_dtype == "float32":
            return CacheFormat()
        weights = float_matrices(self._weights)
        windows = quality_windows(self._data, "train", self._length, tokens=CALIBRATION_TOKENS)[:, :-1]
        per_channel = observe_kv_scales(self.graph(weights), windows)
        scales = {"per-tensor": per_channel.per_tensor(), "per-channel": per_channel}
        figures = {method: self._measure(self.graph(weights, kv_scales)) for method, kv_scales in scales.items()}
        enough = 1 + KV_LOSS_SHARE * (self._limit - 1)
        method = min(figures, key=lambda m: figures[m]["kl"])
        if figures["per-tensor"]["bpb_ratio"] <= enough:
            method = "per-tensor"
        log.info("int8 cache: scales %s", method)
        candidates = [{"method": m, **measured} for m, measured in figures.items()]
        return CacheFormat(scales=scales[method], record={"method": method, "candidates": candidates})

    def _choose_int8(self) -> Quantized:
        fastest = quantize_rtn(self._weights, "int8", self._settings)
        if self._settings.int8_block_size <= SMALLEST_BLOCK:
            return fastest
        figures = self._measure(self.graph(fastest.matrices), tokens=INT8_CHOICE_TOKENS)
        candidate = {"block_size": self._settings.int8_block_size, "bytes": fastest.record["bytes"], **figures}
        log.info("int8 candidate: %s", candidate)
        if figures["kl"] / figures["reference_loss"] <= INT8_LOSS_SHARE * (self._limit - 1):
            chosen, block_size = fastest, self._settings.int8_block_size
        else:
            block_size = SMALLEST_BLOCK
            chosen = quantize_rtn(self._weights, "int8", replace(self._settings, int8_block_size=block_size))
        record = {**chosen.record, "block_size": block_size, "candidates": [candidate]}
        return Quantized(matrices=chosen.matrices, record=record)

    def _choose_int4(self) -> Quantized:
        ladder = Ladder(self._options())
        candidates: list[dict[str, Any]] = []

        def measure(rung: int) -> float:
            mix = ladder.mix(rung)
            figures = self._measure(self.graph({name: option.matrix for name, option in mix.items()}))
            counts = Counter(option.label for option in mix.values())
            candidates.append(
                {
                    "bytes": ladder.num_bytes(rung),
                    "formats": dict(sorted(counts.items())),
                    "expected_kl": round(ladder.expected_kl(rung), 6),
                    **figures,
                }
            )
            log.info("int4 candidate: %s", candidates[-1])
            # Over few tokens the KL is the steadier measure of how much the loss must grow.
            return max(figures["bpb_ratio"] - 1, figures["kl"] / figures["reference_loss"])

        rung = find_smallest(ladder, measure, CHOICE_SHARE * (self._limit - 1))
        mix = ladder.mix(rung)
        record = {
            "method": "gptq",
            "bytes": ladder.num_bytes(rung),
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
            name: [Option(label="as stored", num_bytes=found[name].num_bytes, expected_kl=0.0, matrix=found[name])]
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
                num_bytes=matrix.num_bytes,
                # Of most matrices all options but one come to nothing.
                matrix=dataclasses.replace(matrix, codes_NCE=put_away(matrix.codes_NCE, self._scratch)),
            )

        sizes = dict.fromkeys(self._block_size(name, s) for s in (self._settings.int4_block_size, SMALLEST_BLOCK))
        formats = [(4, size) for size in sizes] + [(8, self._block_size(name, self._settings.int8_block_size))]
        return [option(_round(values, curvature, bits, block_size)) for bits, block_size in formats]

    def _block_size(self, name: str, wanted: int) -> int:
        # Lookup and product read the same bytes of a table only if its rows have no padding.
        cfg = self._weights.spec
        width = cfg.dim if name in table_names(self._weights) else self._weights[f"{name}.weight"].shape[1]
        return block_size_for(width, wanted)

    def _measure(self, graph: StandardGraph, *, tokens: int = CHOICE_TOKENS) -> dict[str, float]:
        """The figures that a candidate is chosen by."""
        windows = quality_windows(self._data, "val", self._length, tokens=tokens)
        found = evaluate_artifacts(self.reference, {"artifact": graph}, windows, self._data.byte_lengths)
        figures = {name: round(getattr(found["artifact"], name), 6) for name in ("bpb_ratio", "kl", "top1", "tokens")}
        return {**figures, "reference_loss": round(found[REFERENCE].loss, 6)}


def _round(values_NK: FloatArray, curvature: Curvature | None, bits: int, block_size: int) -> BlockMatrix:
    """By GPTQ where the matrix has inputs; 8 bits are fine enough for the zero to stay in the middle."""
    if curvature is None:
        return round_by_search(values_NK, bits=bits, block_size=block_size, asymmetric=bits == 4)
    return round_by_gptq(values_NK, curvature, bits=bits, block_size=block_size, asymmetric=bits == 4)
