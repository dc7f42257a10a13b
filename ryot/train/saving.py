"""What a training leaves: checkpoints to go on from, and at its end a model to use.

On the way adapters are kept alone, in `peft`'s layout, beside the training's state; the end of a training is a whole
model, its adapters merged and its weights rounded where they were trained so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ryot.adaptation import RoundingConfig
from ryot.config import VariantConfig
from ryot.errors import CheckpointError
from ryot.models.block_sizes import block_size_for
from ryot.models.registry import tensor_maps
from ryot.models.sources.rounded import ROUNDING_NAME
from ryot.models.spec import DecoderSpec, parameter_shapes
from ryot.train.checkpoint import Text, Weights, load_decoder_arrays, model_files, write_checkpoint
from ryot.train.dataset import Dataset
from ryot.train.lora import ADAPTER_WEIGHTS, adapter_files, load_adapter_tensors, merged_state
from ryot.train.model import Decoder
from ryot.train.rounding import matrix_formats

#: The parameter that a checkpoint stores as it is used, and `training/` as it is trained.
_TABLE = "embedding.weight"
#: Where a finished checkpoint keeps its adapter.
_ADAPTER_FOLDER = "adapter"


def save_training(
    directory: Path,
    model: Decoder,
    variant: VariantConfig,
    dataset: Dataset,
    *,
    done: bool,
    training: Mapping[str, object],
    training_tensors: Mapping[str, Tensor],
) -> str:
    """Write a checkpoint of a training in progress or at its end; returns its digest."""
    text = Text.of(dataset)
    if variant.lora is not None and not done:
        assert variant.init is not None
        files = {**adapter_files(model, variant.lora, variant.init.source), **text.files}
        return write_checkpoint(directory, files, None, training, training_tensors)
    state = merged_state(model) | {_TABLE: lambda: model.table_VE}
    files = model_files(model.spec, text)
    if variant.lora is None:
        training_tensors = {**training_tensors, _TABLE: model.embedding.weight.detach()}
    elif variant.lora.keep_adapter:
        assert variant.init is not None
        own = adapter_files(model, variant.lora, variant.init.source)
        files |= {f"{_ADAPTER_FOLDER}/{name}": data for name, data in own.items()}
    if variant.rounding is not None and done:
        formats = json.dumps(rounded_formats(model.spec, variant.rounding), indent=1)
        files[ROUNDING_NAME] = f"{formats}\n".encode()
    weights = Weights(model.spec, lambda name: state[name]())
    return write_checkpoint(directory, files, weights, training, training_tensors)


def load_trained(model: Decoder, variant: VariantConfig, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Set the weights of a new decoder to those of a checkpoint on the way; `tensors` are its training state's."""
    if variant.lora is None:
        arrays = load_decoder_arrays(checkpoint, variant.model.spec)
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        model.load_state_dict({**state, _TABLE: tensors[_TABLE]})
        return
    path = checkpoint / ADAPTER_WEIGHTS
    if not path.exists():
        path = checkpoint / _ADAPTER_FOLDER / ADAPTER_WEIGHTS
    try:
        load_adapter_tensors(model, safetensors.torch.load_file(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"checkpoint {checkpoint}: {ADAPTER_WEIGHTS} cannot be read ({error})") from error


def rounded_formats(spec: DecoderSpec, config: RoundingConfig) -> dict[str, tuple[int, int]]:
    """Bits and block size of every stored tensor that lies on the grid of its export, by Hugging Face's names."""
    formats, shapes = matrix_formats(spec, config), parameter_shapes(spec)
    found: dict[str, tuple[int, int]] = {}
    for entry in tensor_maps(spec):
        name = entry.name.removesuffix(".weight")
        if name not in formats or entry.layout != "rows" or not entry.name.endswith(".weight"):
            continue
        bits, size = formats[name]
        width = shapes[entry.name][1]
        size = block_size_for(width, size)
        if width % size == 0:
            found |= dict.fromkeys(entry.tensors, (bits, size))
    return found
