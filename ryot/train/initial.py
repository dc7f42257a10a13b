"""What a training starts from: the weights of a checkpoint, as a decoder that can be trained."""

from __future__ import annotations

from ryot.config import Attention, VariantConfig
from ryot.errors import CheckpointError
from ryot.models.arrays import read_arrays
from ryot.models.registry import read_spec
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.sources.opening import open_checkpoint
from ryot.models.tensors import FloatArray
from ryot.train.checkpoint import build_decoder
from ryot.train.lora import add_adapters
from ryot.train.model import Decoder


def open_unchanged(source: str, sha256: str) -> Checkpoint:
    """A source that a recipe names. Raises `CheckpointError` when it is not what the recipe was resolved with."""
    checkpoint = open_checkpoint(source)
    if checkpoint.sha256 != sha256:
        raise CheckpointError(
            f"checkpoint {source}: has changed since the run began (sha256 {checkpoint.sha256[:12]}…, was "
            f"{sha256[:12]}…)",
            hint="restore it, or start a new run",
        )
    return checkpoint


def build_initial(variant: VariantConfig, attention: Attention) -> Decoder:
    """A new decoder of a recipe: of random weights, or of its checkpoint's with adapters where it asks for them."""
    spec = variant.model.spec
    if variant.init is None:
        return Decoder(spec, attention).train()
    arrays = load_initial_arrays(variant)
    model = build_decoder(spec, arrays, attention)
    if variant.lora is not None:
        add_adapters(model, variant.lora)
    else:
        model.requires_grad_(True)
    return model.train()


def load_initial_arrays(variant: VariantConfig) -> dict[str, FloatArray]:
    """The arrays of a recipe's checkpoint, its table of positions cut to the context that is kept."""
    assert variant.init is not None
    checkpoint = open_unchanged(variant.init.source, variant.init.sha256)
    spec = read_spec(checkpoint.config, checkpoint.where)
    arrays = dict(read_arrays(spec, checkpoint.names(), checkpoint.load, checkpoint.where))
    if spec.learned_positions:
        rows = variant.model.max_seq_len + spec.position_offset
        arrays["positions.weight"] = arrays["positions.weight"][:rows].copy()
    return arrays
