"""Chooses how the weights of each form are rounded, by what it costs on held-out text.

`int8-dyn` and `int8` are rounded to nearest: their loss is far below what held-out text resolves. `int4` is the
smallest of these that stays within the limit, on the validation split:

    nearest      every matrix 4 bits, rounded to nearest
    error-aware  every matrix 4 bits, rounded so that outputs change least (rounding.py)
    mixed        error-aware, and the matrices that hurt most for their size at 8 bits, as few as suffice

An int8 cache has one scale for a layer's keys and one for its values, with which the fused attention is fastest, where
that takes a small part of the loss allowed; elsewhere that or a scale a channel, whichever is closer to float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ryot.deploy.forms import FormMatrices, QuantizeOptions, num_bytes, pair_matrices, quantize_matrices, table_names
from ryot.deploy.graph import KVScales, float_matrices
from ryot.deploy.matrices import BlockMatrix, Matrix, block_size_for, quantize_blocks
from ryot.deploy.quality import EvalData, Quality, evaluate_forms, quality_windows
from ryot.deploy.rounding import Calibration, calibrate, round_by_error, round_by_search
from ryot.deploy.standard import StandardGraph, write_standard_graph
from ryot.deploy.weights import DecoderWeights

log = logging.getLogger(__name__)

#: Training tokens that the inputs of each matrix are observed over.
CALIBRATION_TOKENS = 8_192
#: Validation tokens that a choice is made on, and that the sensitivity of single matrices is measured on.
CHOICE_TOKENS, SENSITIVITY_TOKENS = 10_000, 2_000
#: Share of the loss allowed that a cache with few scales may take; the rest is left for the weights.
KV_LOSS_SHARE = 0.1

Matrices = Mapping[str, Matrix]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """The matrices of a form and how they came about."""

    matrices: Matrices
    record: Mapping[str, Any]
    """For the manifest: method, block size, names of the 8-bit matrices, candidates with their figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheForm:
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


def round_to_nearest(weights: DecoderWeights, precision: str, options: QuantizeOptions) -> Quantized:
    """The matrices of a single precision, rounded to nearest."""
    matrices = quantize_matrices(weights, precision, options)
    method = "none" if precision == "fp32" else "nearest"
    return Quantized(matrices=matrices, record={"method": method, "bytes": num_bytes(matrices)})


def closest_within(candidates: Iterable[dict[str, Any]], max_bpb_ratio: float) -> dict[str, Any] | None:
    """Of the candidates within the limit the one closest to float32, by KL; None when none is within it."""
    within = [c for c in candidates if c["bpb_ratio"] <= max_bpb_ratio]
    return min(within, key=lambda c: c["kl"], default=None)


class Quantizer:
    """Quantizes one decoder; calibration and the float32 reference graph are made once, when first needed."""

    def __init__(
        self, weights: DecoderWeights, data: EvalData, options: QuantizeOptions, max_bpb_ratio: float, scratch: Path
    ):
        self._weights, self._data, self._options = weights, data, options
        self._limit, self._scratch = max_bpb_ratio, scratch
        self._length = weights.spec.max_seq_len
        self._num_graphs = 0

    def quantize(self, precision: str) -> Quantized:
        """The matrices of a single (not paired) precision."""
        if precision == "int4":
            return self._choose_int4()
        return round_to_nearest(self._weights, precision, self._options)

    def form(self, precision: str, singles: Mapping[str, Quantized]) -> FormMatrices:
        """The matrices of a form, pairs included."""
        return pair_matrices(self._weights, precision, {half: q.matrices for half, q in singles.items()})

    def graph(self, matrices: Matrices, kv_scales: KVScales | None = None) -> StandardGraph:
        """The standard graph of these matrices, in the scratch folder."""
        self._num_graphs += 1
        folder = self._scratch / f"graph-{self._num_graphs}"
        folder.mkdir()
        return write_standard_graph(folder, self._weights, matrices, kv_scales=kv_scales)

    @cached_property
    def reference(self) -> StandardGraph:
        """The standard graph in float32."""
        return self.graph(float_matrices(self._weights))

    def choose_cache(self) -> CacheForm:
        """The cache of the type asked for; an int8 cache's scales are chosen on validation text, weights in float32."""
        if self._options.kv_dtype == "float32":
            return CacheForm()
        per_channel = observe_kv_scales(self.reference, self._calibration_windows())
        scales = {"per-tensor": per_channel.per_tensor(), "per-channel": per_channel}
        weights = float_matrices(self._weights)
        figures = {method: self._measure(self.graph(weights, kv_scales)) for method, kv_scales in scales.items()}
        enough = 1 + KV_LOSS_SHARE * (self._limit - 1)
        method = min(figures, key=lambda m: figures[m]["kl"])
        if figures["per-tensor"]["bpb_ratio"] <= enough:
            method = "per-tensor"
        log.info("int8 cache: scales %s", method)
        candidates = [{"method": m, **measured} for m, measured in figures.items()]
        return CacheForm(scales=scales[method], record={"method": method, "candidates": candidates})

    def _calibration_windows(self) -> NDArray[np.int64]:
        return quality_windows(self._data, "train", self._length, tokens=CALIBRATION_TOKENS)[:, :-1]

    @cached_property
    def _calibration(self) -> Calibration:
        folder = self._scratch / "calibration"
        folder.mkdir()
        return calibrate(self._weights, self._calibration_windows(), folder)

    def _choose_int4(self) -> Quantized:
        nearest = {name: self._nearest(name, 4) for name in float_matrices(self._weights)}
        aware = {name: self._error_aware(name, 4) for name in nearest}
        candidates = [self._score("nearest", nearest, []), self._score("error-aware", aware, [])]
        best = closest_within(candidates, self._limit)
        if best:
            chosen: Matrices = nearest if best["method"] == "nearest" else aware
        else:
            best, chosen = self._choose_mixed(aware, candidates)
        log.info("int4: %s of %d candidates chosen", best["method"], len(candidates))
        record = {"method": best["method"], "bytes": best["bytes"], "eight_bit": best["eight_bit"]}
        return Quantized(matrices=chosen, record={**record, "candidates": candidates})

    def _choose_mixed(self, aware: Matrices, candidates: list[dict[str, Any]]) -> tuple[dict[str, Any], Matrices]:
        """The fewest matrices at 8 bits that bring the form within the limit; all of them if none do."""
        eight = {name: self._nearest(name, 8) for name in aware}
        order = self._by_sensitivity(aware, eight)

        def mix(count: int) -> dict[str, Matrix]:
            return {**aware, **{name: eight[name] for name in order[:count]}}

        low, high = 0, len(order)
        scored = {high: self._score("mixed", mix(high), order)}
        while high - low > 1:
            middle = (low + high) // 2
            scored[middle] = self._score("mixed", mix(middle), order[:middle])
            low, high = (low, middle) if scored[middle]["bpb_ratio"] <= self._limit else (middle, high)
        candidates += scored.values()
        return scored[high], mix(high)

    def _by_sensitivity(self, four: Matrices, eight: Matrices) -> list[str]:
        """Names of the matrices, the one first whose 8 bits lower KL most for each byte they cost."""
        windows = quality_windows(self._data, "val", self._length, tokens=SENSITIVITY_TOKENS)

        def kl(matrices: Matrices) -> float:
            forms = {"form": self.graph(matrices)}
            return evaluate_forms(self.reference, forms, windows, self._data.byte_lengths)["form"].kl

        base = kl(four)
        gain = {
            name: (base - kl({**four, name: eight[name]})) / (eight[name].num_bytes - four[name].num_bytes)
            for name in four
        }
        return sorted(four, key=lambda name: (-gain[name], name))

    def _score(self, method: str, matrices: Matrices, eight_bit: list[str]) -> dict[str, Any]:
        return {
            "method": method,
            "bytes": num_bytes(matrices),
            "eight_bit": sorted(eight_bit),
            **self._measure(self.graph(matrices)),
        }

    def _measure(self, graph: StandardGraph) -> dict[str, float]:
        """The figures that a candidate is chosen by."""
        windows = quality_windows(self._data, "val", self._length, tokens=CHOICE_TOKENS)
        found: Quality = evaluate_forms(self.reference, {"form": graph}, windows, self._data.byte_lengths)["form"]
        return {name: round(getattr(found, name), 6) for name in ("bpb_ratio", "kl", "top1")}

    def _block_size(self, name: str, bits: int) -> int:
        # Lookup and product read the same bytes of a table only if its rows have no padding.
        size = self._options.block_size(bits)
        return block_size_for(self._weights.spec.dim, size) if name in table_names(self._weights) else size

    def _nearest(self, name: str, bits: int) -> BlockMatrix:
        return quantize_blocks(self._weights[f"{name}.weight"], bits=bits, block_size=self._block_size(name, bits))

    def _error_aware(self, name: str, bits: int) -> BlockMatrix:
        values, block_size = self._weights[f"{name}.weight"], self._block_size(name, bits)
        moments = self._calibration.moments.get(name)
        if moments is None:  # a table that is only looked up: no product, no inputs
            return round_by_search(values, np.ones(values.shape[1], np.float32), bits=bits, block_size=block_size)
        return round_by_error(values, moments, bits=bits, block_size=block_size)
