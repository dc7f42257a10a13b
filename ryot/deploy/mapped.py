"""Weights that lie in a file: pages come into memory when they are read, and go back without being written anywhere.

A checkpoint's float32 weights are needed again and again while it is exported, but seldom all at once. They are read
from the data file of the float32 bundle that parity is checked on, which is on the disk anyway; what a stage or a layer
has read is released behind it, and what another stage reads comes from the system's file cache.
"""

from __future__ import annotations

import functools
import mmap
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ryot.deploy.weights import DecoderWeights
from ryot.models.tensors import FloatArray
from ryot.train.model import Decoder, RotaryTables, without_memory

T = TypeVar("T", bound=np.generic)

_PAGE = mmap.PAGESIZE
#: What is smaller is not worth an open file.
MIN_FILE_BYTES = 1 << 20
#: Every mapping that is in use.
_MAPPINGS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class MappedArrays(Mapping[str, FloatArray]):
    """Arrays by name, those of some of them in a file that is mapped into memory."""

    def __init__(self, path: Path, offsets: Mapping[str, int], arrays: Mapping[str, FloatArray]):
        """`offsets` say where in the file each array may stand; one that does not stand there is kept in memory."""
        with path.open("rb") as file:
            self._map = _map_file(file)
        self._places: dict[str, tuple[int, int]] = {}
        self._arrays: dict[str, FloatArray] = dict(arrays)
        for name, offset in offsets.items():
            array = arrays[name]
            found = np.frombuffer(self._map, np.float32, array.size, offset).reshape(array.shape)
            # Compared, so that a fault in writing the file cannot hide: parity holds the file against these.
            if np.array_equal(found, array):
                self._arrays[name] = found
                self._places[name] = (offset, array.nbytes)
                self.release(name)

    def __getitem__(self, name: str) -> FloatArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def release(self, name: str) -> None:
        """Let the whole pages of an array go, if it lies in the file; the next one to read it brings them back."""
        if name in self._places:
            offset, size = self._places[name]
            start, end = -(-offset // _PAGE) * _PAGE, (offset + size) // _PAGE * _PAGE
            if start < end:
                self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def put_away(array: NDArray[T], folder: Path) -> NDArray[T]:
    """The same array in a file without a name on the disk of `folder`, which goes with it; a small one as it is."""
    if array.nbytes < MIN_FILE_BYTES:
        return array
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        return np.frombuffer(_map_file(file), array.dtype).reshape(array.shape)


def release_mapped_arrays() -> None:
    """Let the pages of all mapped arrays of this process go."""
    for mapping in list(_MAPPINGS):
        mapping.madvise(mmap.MADV_DONTNEED)


def _map_file(file: IO[bytes]) -> mmap.mmap:
    # Private and writable, because torch warns of arrays that it could not write; nobody does.
    mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    _MAPPINGS.add(mapping)
    return mapping


def map_weights(weights: DecoderWeights, graph: Path, data: Path) -> DecoderWeights:
    """The same weights as they lie in the `data` of a float32 graph; what is not there as it is here stays as it is."""
    offsets: dict[str, int] = {}
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        array = weights.get(tensor.name)
        if array is not None and array.shape == tuple(tensor.dims) and tensor.external_data:
            offsets[tensor.name] = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    return DecoderWeights(spec=weights.spec, arrays=MappedArrays(data, offsets, weights.arrays))


def release_behind(model: Decoder, arrays: Mapping[str, FloatArray]) -> None:
    """Have each layer of a torch decoder over mapped arrays let its pages go when it has been computed."""
    for i, layer in enumerate(model.layers):
        names = [f"layers.{i}.{name}" for name in layer.state_dict()]
        layer.register_forward_hook(functools.partial(_release, arrays, names))


def stream_decoder(weights: DecoderWeights) -> Decoder:
    """A torch decoder in evaluation mode whose layers have their weights only while they are computed."""
    arrays = weights.arrays
    with without_memory():
        model = Decoder(weights.spec)
    outside = {name: torch.from_numpy(arrays[name]) for name in arrays if not name.startswith("layers.")}
    model.load_state_dict(outside, strict=False, assign=True)
    model.rotary = RotaryTables(weights.spec)
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(functools.partial(_load_layer, arrays, f"layers.{i}"))
        layer.register_forward_hook(functools.partial(_drop_layer, arrays, f"layers.{i}", layer.state_dict()))
    return model.eval().requires_grad_(False)


def _load_layer(arrays: Mapping[str, FloatArray], prefix: str, layer: nn.Module, _inputs: object) -> None:
    names = list(layer.state_dict())
    layer.load_state_dict({name: torch.from_numpy(arrays[f"{prefix}.{name}"]) for name in names}, assign=True)


def _drop_layer(
    arrays: Mapping[str, FloatArray],
    prefix: str,
    without: Mapping[str, Tensor],
    layer: nn.Module,
    _inputs: object,
    _out: object,
) -> None:
    layer.load_state_dict(without, assign=True)
    _release(arrays, [f"{prefix}.{name}" for name in without])


def _release(arrays: Mapping[str, FloatArray], names: Sequence[str], *_call: object) -> None:
    if isinstance(arrays, MappedArrays):
        for name in names:
            arrays.release(name)
