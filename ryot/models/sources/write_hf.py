"""A checkpoint of any source, written as the folder that `from_pretrained` loads."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ryot.atomic import atomic_folder
from ryot.errors import CheckpointError
from ryot.models.sources.checkpoint import Checkpoint, FloatArray, Json

#: From this size on the weights are split over several files, as transformers does.
SHARD_BYTES = 5_000_000_000
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


def write_hf(checkpoint: Checkpoint, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config, weights, tokenizer and generation config; the folder appears whole or not at all.

    Weights keep float16 or bfloat16 where the source has nothing else, and are float32 otherwise. Raises
    `CheckpointError` when the folder exists, or the disk is too small for it.
    """
    if folder.exists():
        raise CheckpointError(f"checkpoint {folder}: exists already; checkpoints are never overwritten")
    dtype = stored_dtype(checkpoint)
    sizes = {name: math.prod(checkpoint.shape(name)) * _WIDTHS[dtype] for name in checkpoint.names()}
    check_space(folder, sum(sizes.values()))
    config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    shards = _shards(sizes, shard_bytes)
    try:
        with atomic_folder(folder) as partial:
            _write_json(partial / "config.json", {**config, "dtype": _DTYPES[dtype]})
            if checkpoint.generation_config:
                _write_json(partial / "generation_config.json", checkpoint.generation_config)
            for name, data in checkpoint.files.items():
                (partial / name).write_bytes(data)
            for file, names in shards.items():
                _write_safetensors(partial / file, checkpoint, names, dtype)
            if len(shards) > 1:
                weight_map: dict[str, Json] = {name: file for file, names in shards.items() for name in names}
                index: dict[str, Json] = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                _write_json(partial / "model.safetensors.index.json", index)
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: cannot be written ({error.strerror})") from error


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The half precision that every weight of a checkpoint has, else "F32"."""
    dtypes = {checkpoint.dtype(name) for name in checkpoint.names()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {"F16", "BF16"} else "F32"


def check_space(target: Path, num_bytes: int) -> None:
    """Raises `CheckpointError` when the disk that `target` is to lie on has not that much free."""
    folder = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise CheckpointError(
            f"checkpoint {target}: needs {num_bytes / 1e6:.1f} MB, {folder} has {free / 1e6:.1f} MB free",
            hint="give a path on a larger disk",
        )


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """File -> names of tensors, in order, no file above `shard_bytes` unless one tensor is."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > shard_bytes:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_safetensors(path: Path, checkpoint: Checkpoint, names: list[str], dtype: str) -> None:
    """One file, a tensor in memory at a time; see safetensors_file for the format."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape = checkpoint.shape(name)
        end = offset + math.prod(shape) * _WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _encode(checkpoint.load(name), dtype).tofile(file)


def _encode(values: FloatArray, dtype: str) -> NDArray[np.generic]:
    if dtype == "BF16":
        # Exact: the values were bfloat16, so the lower half of each float32 is zero.
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return values.astype(np.float16) if dtype == "F16" else values


def _write_json(path: Path, values: Mapping[str, Json]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
