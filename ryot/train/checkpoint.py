"""Checkpoints: a Hugging Face folder plus `training/`, written so that it is there whole or not at all.

config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json
training/state.json           step, wall time, resolved recipe and kernel plan
training/state.safetensors    optimizer moments and the random generator's state
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from ryot.atomic import atomic_folder
from ryot.config import Attention
from ryot.errors import CheckpointError
from ryot.mapping import Unchecked
from ryot.models.arrays import read_arrays
from ryot.models.registry import read_spec, tensor_maps, write_config
from ryot.models.sources.safetensors_file import write_float32
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import FloatArray, hf_shapes, hf_tensors
from ryot.models.token_ids import TokenIds
from ryot.train.dataset import Dataset
from ryot.train.model import Decoder, RotaryTables, without_memory
from ryot.train.source_text import OWN_IDS
from ryot.train.tokenizer import tokenizer_config

SCHEMA = 1
_WEIGHTS = "model.safetensors"
_STATE = "training/state.json"
_STATE_TENSORS = "training/state.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What a checkpoint says about its text."""

    token_ids: TokenIds
    files: Mapping[str, bytes]
    """The tokenizer's, by name; of a tokenizer that was learned here `tokenizer.json` alone."""
    is_own: bool
    """Whether it was learned here."""

    @classmethod
    def own(cls, tokenizer_json: bytes) -> Text:
        """Of a tokenizer that was learned here."""
        return cls(token_ids=OWN_IDS, files={"tokenizer.json": tokenizer_json}, is_own=True)

    @classmethod
    def of(cls, dataset: Dataset) -> Text:
        """Of the tokenizer that a dataset was made with."""
        if not dataset.text_files:
            return cls.own((dataset.path / "tokenizer.json").read_bytes())
        files = {name: (dataset.path / name).read_bytes() for name in dataset.text_files}
        return cls(token_ids=dataset.token_ids, files=files, is_own=False)


def save_checkpoint(
    directory: Path,
    *,
    spec: DecoderSpec,
    state: Mapping[str, Tensor],
    tokenizer_json: bytes,
    training: Mapping[str, object] | None = None,
    training_tensors: Mapping[str, Tensor] | None = None,
) -> str:
    """Write a checkpoint under a tokenizer of our own, as `write_checkpoint` does; returns its digest."""
    model = Weights(spec, lambda name: state[name])
    return write_checkpoint(directory, model_files(spec, Text.own(tokenizer_json)), model, training, training_tensors)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a whole model, made one by one when they are written."""

    spec: DecoderSpec
    load: Callable[[str], Tensor]
    """A parameter by its name in `Decoder.state_dict()`."""

    def write(self, path: Path) -> None:
        """Write them under Hugging Face's names."""
        maps = tensor_maps(self.spec)
        arrays = hf_tensors(self.spec, maps, lambda name: self.load(name).detach().cpu().numpy())
        write_float32(path, hf_shapes(self.spec, maps), arrays)


def model_files(spec: DecoderSpec, text: Text) -> dict[str, bytes]:
    """The files of a whole model by name, without its weights."""
    ids = text.token_ids
    eos: int | list[int] | None = list(ids.eos) if len(ids.eos) > 1 else next(iter(ids.eos), None)
    token_ids = {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}
    files = {"config.json": _json({**write_config(spec), **token_ids, "dtype": "float32"}), **text.files}
    if text.is_own:
        files["generation_config.json"] = _json({"eos_token_id": eos, "bos_token_id": ids.bos, "do_sample": False})
        files["tokenizer_config.json"] = _json(tokenizer_config(spec.max_seq_len))
    return files


def write_checkpoint(
    directory: Path,
    files: Mapping[str, bytes],
    weights: Weights | None,
    training: Mapping[str, object] | None,
    training_tensors: Mapping[str, Tensor] | None,
) -> str:
    """Write a checkpoint that appears under `directory` only when all of it is on disk; returns its digest.

    Raises `CheckpointError` when it cannot be written (a disk that is full, read-only or gone) or exists already.
    """
    if directory.exists():
        raise CheckpointError(f"checkpoint {directory}: exists already; checkpoints are never overwritten")
    files = dict(files)
    if training is not None:
        files[_STATE] = _json({"schema": SCHEMA, **training})
    try:
        with atomic_folder(directory) as partial:
            for name, data in files.items():
                path = partial / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
            if weights is not None:
                weights.write(partial / _WEIGHTS)
            if training is not None:
                kept = {name: tensor.contiguous() for name, tensor in (training_tensors or {}).items()}
                safetensors.torch.save_file(kept, partial / _STATE_TENSORS)
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory}: cannot be written ({error.strerror})") from error
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {directory}: cannot be written ({error})") from error
    return checkpoint_digest(directory)


def checkpoint_digest(directory: Path) -> str:
    """sha256 over the names and contents of all files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_checkpoint_spec(directory: Path) -> DecoderSpec:
    """What the decoder of a checkpoint is made of.

    Raises `CheckpointError` when it is no checkpoint or of a kind that cannot be run.
    """
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"checkpoint {directory}: config.json is missing", hint="give the folder of one checkpoint"
        )
    return read_spec(_read_json(path), str(path))


def load_weights(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint under Hugging Face's names. Raises `CheckpointError` for a file cut short."""
    try:
        return safetensors.numpy.load_file(directory / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {directory}: {_WEIGHTS} cannot be read ({error})") from error


def load_decoder_arrays(directory: Path, spec: DecoderSpec) -> dict[str, FloatArray]:
    """The float32 arrays of a checkpoint's decoder under the names of `Decoder.state_dict()`.

    Raises `CheckpointError` for a tensor that is missing, not known, of another shape than the config says, or not
    finite.
    """
    tensors = load_weights(directory)
    return dict(read_arrays(spec, tensors, lambda name: tensors[name].astype(np.float32, copy=False), str(directory)))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises `CheckpointError` when it is missing or malformed."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"checkpoint {directory}: tokenizer.json is missing")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise CheckpointError(f"checkpoint {directory}: tokenizer.json cannot be read ({error})") from error


def load_model(directory: Path) -> Decoder:
    """The decoder of a checkpoint, in evaluation mode."""
    spec = read_checkpoint_spec(directory)
    return build_decoder(spec, load_decoder_arrays(directory, spec))


def build_decoder(spec: DecoderSpec, arrays: Mapping[str, FloatArray], attention: Attention = "sdpa") -> Decoder:
    """A torch decoder over these arrays, which it shares and does not copy, in evaluation mode."""
    with without_memory():
        model = Decoder(spec, attention)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, assign=True)
    model.rotary = RotaryTables(spec)
    return model.eval().requires_grad_(False)


def load_training_values(directory: Path) -> Unchecked:
    """What `save_checkpoint` got as `training`, read in no time. Raises as `load_training_state`."""
    if not (directory / _STATE).exists():
        raise CheckpointError(f"checkpoint {directory}: {_STATE} is missing, so training cannot go on from it")
    training = _read_json(directory / _STATE)
    if training.get("schema", 0) > SCHEMA:
        raise CheckpointError(
            f"checkpoint {directory}: schema {training['schema']}, expected at most {SCHEMA}", hint="use a newer ryot"
        )
    return training


def load_training_state(directory: Path) -> tuple[Unchecked, dict[str, Tensor]]:
    """What `save_checkpoint` got as `training` and `training_tensors`.

    Raises `CheckpointError` when it is missing, cut short or of a newer schema.
    """
    training = load_training_values(directory)
    try:
        return training, safetensors.torch.load_file(directory / _STATE_TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {directory}: {_STATE_TENSORS} cannot be read ({error})") from error


def _json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} is not a JSON object")
    return values
