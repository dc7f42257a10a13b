"""A Hugging Face folder: config.json, safetensors whole or sharded, the tokenizer's files; pickle is never loaded."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ryot.errors import CheckpointError
from ryot.models.sources.checkpoint import TOKENIZER_FILES, Checkpoint, FloatArray, Json, QuantBlocks, Tensors
from ryot.models.sources.packed import open_packed
from ryot.models.sources.rounded import ROUNDING_NAME, RoundedTensors
from ryot.models.sources.safetensors_file import StoredTensor, load_float32, read_safetensors_header

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
logger = logging.getLogger(__name__)


class SafetensorsTensors:
    """The tensors of one or several safetensors files."""

    def __init__(self, stored: dict[str, StoredTensor]):
        self._stored = stored

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> str:
        return self._stored[name].dtype

    def load(self, name: str) -> FloatArray:
        return load_float32(self._stored[name], name)

    def blocks(self, name: str) -> QuantBlocks | None:
        return None


def open_folder(folder: Path, where: str | None = None, revision: str | None = None) -> Checkpoint:
    """The checkpoint in `folder`, its weights not yet read.

    Raises `CheckpointError` in one line for whatever is missing, cut short, ambiguous or of a kind that is not read.
    """
    where = where or str(folder)
    config = _read_json(folder / "config.json", where)
    if config is None:
        raise _no_config(folder, where)
    stored = _find_tensors(folder, where)
    for name, tensor in stored.items():
        if tensor.dtype.startswith(("F8", "F4", "F6", "E8")):
            raise CheckpointError(
                f"checkpoint {where}: tensor {name} is {tensor.dtype}, expected F32, F16 or BF16",
                hint="use the model's bf16 weights",
            )
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    tensors: Tensors = SafetensorsTensors(stored)
    quantization = config.get("quantization_config")
    if quantization is not None:
        tensors = open_packed(stored, quantization, where)
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    if (formats := _read_json(folder / ROUNDING_NAME, where)) is not None:
        tensors = RoundedTensors(tensors, formats, where)
    generation_config = _read_json(folder / "generation_config.json", where) or {}
    read = ["config.json", "generation_config.json", ROUNDING_NAME, *files, *{t.path.name for t in stored.values()}]
    return Checkpoint(
        where=where,
        kind="hf",
        config=config,
        generation_config=generation_config,
        files=files,
        tensors=tensors,
        digest=_digest_of(folder, [name for name in read if (folder / name).is_file()]),
        revision=revision,
    )


def _find_tensors(folder: Path, where: str) -> dict[str, StoredTensor]:
    """The tensors of a folder by the rule of `from_pretrained`, less its silence.

    The index is followed where there is one, and other safetensors files beside it (a second layout, an adapter) are
    left out with a warning; an index beside a whole model.safetensors leaves open which is meant, and is refused.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if not (folder / _INDEX).exists():
        if _WEIGHTS not in present:
            raise _no_weights(folder, where, present)
        _warn_of_others(where, [name for name in present if name != _WEIGHTS], _WEIGHTS)
        return read_safetensors_header(folder / _WEIGHTS)
    if _WEIGHTS in present:
        raise CheckpointError(
            f"checkpoint {where}: has both {_WEIGHTS} and {_INDEX}, so it is open which weights are meant",
            hint="remove one of them",
        )
    shard_of = _read_index(folder, where, present)
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        for name, tensor in read_safetensors_header(folder / shard).items():
            if name in stored:
                raise CheckpointError(
                    f"checkpoint {where}: tensor {name} stands in {stored[name].path.name} and {shard}"
                )
            stored[name] = tensor
    for name, shard in shard_of.items():
        if name not in stored or stored[name].path.name != shard:
            raise CheckpointError(f"checkpoint {where}: tensor {name} is not in {shard}, where {_INDEX} puts it")
    return stored


def _read_index(folder: Path, where: str, present: list[str]) -> dict[str, str]:
    """Which shard each tensor is said to be in."""
    index = _read_json(folder / _INDEX, where) or {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"checkpoint {where}: {_INDEX} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"checkpoint {where}: {_INDEX} names {shard}, expected a file beside it")
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"checkpoint {where}: shard {shard} is missing, which {_INDEX} names", hint="download it again"
            )
    _warn_of_others(where, [name for name in present if name not in shards], _INDEX)
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _warn_of_others(where: str, others: list[str], used: str) -> None:
    if others:
        logger.warning("checkpoint %s: %s left out; the weights are those of %s", where, ", ".join(others), used)


def _no_weights(folder: Path, where: str, present: list[str]) -> CheckpointError:
    if "adapter_model.safetensors" in present or (folder / "adapter_config.json").exists():
        return CheckpointError(
            f"checkpoint {where}: is an adapter, expected a whole model",
            hint="merge it into its base model first (peft: merge_and_unload, save_pretrained); a training that was "
            "stopped goes on with 'ryot-deploy train --resume'",
        )
    if present:
        return CheckpointError(
            f"checkpoint {where}: has {', '.join(present)}, expected {_WEIGHTS} or {_INDEX}",
            hint="save it with transformers' save_pretrained",
        )
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in _PICKLES and path.name != "training_args.bin"
    )
    if pickles:
        return CheckpointError(
            f"checkpoint {where}: {pickles[0]} is a pickle, which can run code when it is loaded, and is refused",
            hint="save it with transformers' save_pretrained, which writes safetensors",
        )
    return CheckpointError(f"checkpoint {where}: {_WEIGHTS} is missing")


def _no_config(folder: Path, where: str) -> CheckpointError:
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return CheckpointError(
            f"checkpoint {where}: config.json is missing", hint=f"for the GGUF file in it give {folder / gguf[0]}"
        )
    return CheckpointError(f"checkpoint {where}: config.json is missing", hint="give the folder of one checkpoint")


def _read_json(path: Path, where: str) -> dict[str, Json] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {where}: {path.name} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint {where}: {path.name} is not a JSON object")
    return values


def _digest_of(folder: Path, names: list[str]) -> Callable[[], str]:
    @cache
    def digest() -> str:
        total = hashlib.sha256()
        for name in sorted(names):
            total.update(name.encode() + b"\0")
            with (folder / name).open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    return digest
