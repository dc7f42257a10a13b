"""An exported graph whose weights are replaced while it is used: what samples answers from a model that learns.

The graph is built once, by the code that builds every export. Its constants lie in one file, each at a place of its
own; new weights are rounded and written there by the same code, and the sessions are opened again, which takes some
milliseconds at the sizes that are reinforced and lets onnxruntime pack the weights as in any bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from ryot.adaptation import RolloutPrecision
from ryot.deploy.artifact import ONNXRUNTIME_MIN
from ryot.deploy.bundle import graph_entries, write_manifest
from ryot.deploy.datafile import LINE_BYTES, DataFile
from ryot.deploy.graph import build_graph
from ryot.deploy.precisions import graph_files, quantize_matrices, serialize
from ryot.deploy.settings import ExportSettings, dynamic_bits
from ryot.deploy.weights import DecoderWeights
from ryot.edge.bundle import DATA_NAME, Bundle, load_bundle
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import FloatArray


class _Places(DataFile):
    """A data file in which every array keeps its place, by name: equal values today may differ tomorrow."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._offsets: dict[str, int] = {}

    def tensor(self, name: str, array: NDArray[np.generic]) -> onnx.TensorProto:
        """The tensor at its place, its values written there; shapes and single numbers stand in the graph."""
        if array.dtype == np.int64 or array.size < 2:
            return onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        content = np.ascontiguousarray(array)
        if name not in self._offsets:
            self._offsets[name] = self._end
            self._end += -(-content.nbytes // LINE_BYTES) * LINE_BYTES
        offset = self._offsets[name]
        self._file.seek(offset)
        self._file.write(content.data)
        tensor = onnx.TensorProto(
            name=name,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=content.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", self.location), ("offset", offset), ("length", content.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class LiveBundle:
    """A folder with a bundle of a decoder, whose weights `update` replaces."""

    def __init__(
        self,
        folder: Path,
        spec: DecoderSpec,
        text_files: Mapping[str, bytes],
        eos: Sequence[int],
        bos: int | None,
        precision: RolloutPrecision = "fp32",
    ):
        """Nothing can be run before the first `update`."""
        self.folder, self._spec, self._precision = folder, spec, precision
        self._settings = ExportSettings(dynamic_bits=dynamic_bits([None]))
        self._places = _Places(folder / DATA_NAME)
        self._graph = graph_files(precision)["decode"]
        for name, content in text_files.items():
            (folder / name).write_bytes(content)
        self._values = {
            "name": "live",
            "variant": "",
            "seed": 0,
            **graph_entries(spec, precision, "float32"),
            "graphs": dict.fromkeys(("standard", "prefill", "decode"), self._graph),
            "eos_token_ids": list(eos),
            "bos_token_id": bos,
            "onnxruntime_min": ONNXRUNTIME_MIN,
            "golden": [],
            "tolerance": 0.0,
            "prompts": [],
        }
        self._bundle: Bundle | None = None

    def update(self, arrays: Mapping[str, FloatArray]) -> Bundle:
        """Write weights, under the names of `Decoder.state_dict()`; sessions that are opened from now on have them."""
        weights = DecoderWeights(spec=self._spec, arrays=arrays)
        matrices = quantize_matrices(weights, self._precision, self._settings)
        model = build_graph("fast", weights, matrices, self._places)
        self._places.flush()
        if self._bundle is None:
            (self.folder / self._graph).write_bytes(serialize(model))
            write_manifest(self.folder, self._values)
            # What the manifest says of the data file's hash will not be true for long.
            self._bundle = load_bundle(self.folder, verify=False)._replace(verified=True)
        return self._bundle

    def close(self) -> None:
        """Close the file."""
        self._places.close()
