"""Runs a bundle's standard graph: logits of all positions, with a cache that is passed in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from ryot.deploy.datafile import DataFile
from ryot.deploy.graph import KVScales, build_graph
from ryot.deploy.matrices import Matrix
from ryot.deploy.weights import DecoderWeights
from ryot.edge.bundle import DATA_NAME
from ryot.edge.session import ORT_ERRORS, build_session_options
from ryot.errors import ExportError
from ryot.models.tensors import FloatArray

Past = dict[str, NDArray[np.generic]]


class StandardGraph:
    """An onnxruntime session of a standard graph."""

    def __init__(self, path: Path, *, threads: int | None = None, prepack: bool = True):
        """On as many threads as torch has unless told.

        Raises `ExportError` when this onnxruntime cannot load the graph, e.g. because it lacks an operator.
        """
        threads = torch.get_num_threads() if threads is None else threads
        try:
            self._session = ort.InferenceSession(
                path, build_session_options(threads, prepack=prepack), providers=["CPUExecutionProvider"]
            )
        except ORT_ERRORS as error:
            reason = str(error).splitlines()[0]
            raise ExportError(f"{path}: onnxruntime {ort.__version__} cannot load the graph: {reason}") from error
        inputs = self._session.get_inputs()
        self._past = {i.name: (i.shape[1], i.shape[3], i.type) for i in inputs if i.name.startswith("past_key_values.")}
        self._names = {i.name for i in inputs}
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, ids_BS: NDArray[np.int64], past: Past | None = None) -> tuple[FloatArray, Past]:
        """Logits [B, S, V] of the new tokens and the grown cache; without `past` from an empty one.

        With a cache the fused attention takes either one row or one new token.
        """
        results = self._run(ids_BS, past)
        logits = results.pop("logits")
        return logits, {name.replace("present.", "past_key_values."): value for name, value in results.items()}

    def _run(self, ids_BS: NDArray[np.int64], past: Past | None) -> dict[str, NDArray[Any]]:
        B, S = ids_BS.shape
        past = self._empty(B) if past is None else past
        start = next(iter(past.values())).shape[2]
        feed: dict[str, NDArray[np.generic]] = {"input_ids": ids_BS, **past}
        if "attention_mask" in self._names:
            feed["attention_mask"] = np.ones((B, start + S), np.int64)
        if "position_ids" in self._names:
            feed["position_ids"] = np.tile(np.arange(start, start + S, dtype=np.int64), (B, 1))
        return dict(zip(self._outputs, self._session.run(self._outputs, feed)))

    def _empty(self, batch_size: int) -> Past:
        dtypes = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
        return {
            name: np.zeros((batch_size, heads, 0, head_dim), dtypes[kind])
            for name, (heads, head_dim, kind) in self._past.items()
        }


def write_standard_graph(
    folder: Path,
    weights: DecoderWeights,
    matrices: Mapping[str, Matrix],
    *,
    kv_scales: KVScales | None = None,
) -> StandardGraph:
    """Build the standard graph alone in an empty folder and load it."""
    with DataFile(folder / DATA_NAME) as data:
        model = build_graph("standard", weights, matrices, data, kv_scales=kv_scales)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    return StandardGraph(path)
