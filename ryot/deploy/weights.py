"""The weights of a decoder as numpy arrays, and what they are the weights of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ryot.models.arrays import read_arrays
from ryot.models.registry import read_spec
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.spec import DecoderSpec, bounded_spec, linear_names, table_names
from ryot.models.tensors import FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderWeights:
    """A decoder's spec and its float32 arrays under the names of `Decoder.state_dict()`, matrices [out, in]."""

    spec: DecoderSpec
    arrays: Mapping[str, FloatArray]

    def __getitem__(self, name: str) -> FloatArray:
        return self.arrays[name]

    def get(self, name: str) -> FloatArray | None:
        """An array that not every decoder has, such as a bias."""
        return self.arrays.get(name)

    @property
    def head(self) -> str:
        """Name of the output matrix; the embedding's when tied."""
        return "embedding" if self.spec.tie_embeddings else "head"

    @property
    def linears(self) -> list[str]:
        """Names (without `.weight`) of the matrices that a matrix product uses, in the order they are used.

        A tied head is not among them: it is `embedding`.
        """
        return linear_names(self.spec)

    @property
    def tables(self) -> list[str]:
        """The embedding and, where it is a matrix of its own, the head."""
        return table_names(self.spec)


def source_spec(checkpoint: Checkpoint, context: int | None = None) -> DecoderSpec:
    """What the decoder of a checkpoint is made of, its context bounded to `context` tokens.

    Raises `CheckpointError` for a family or a key of its config that is not known, `ConfigError` for a context that the
    model does not have.
    """
    return bounded_spec(read_spec(checkpoint.config, checkpoint.where), context)


def check_weights(checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    """Raise `CheckpointError` for a tensor that is missing or not known; no weights are read for it."""
    read_arrays(spec, checkpoint.names(), checkpoint.load, checkpoint.where)


def load_decoder_weights(checkpoint: Checkpoint, context: int | None = None) -> DecoderWeights:
    """Read all of a checkpoint's weights, for a context of at most `context` tokens.

    Raises like `source_spec`, and `CheckpointError` for a tensor that is missing, not known, of another shape than the
    config says, or not finite.
    """
    spec = source_spec(checkpoint)
    arrays = dict(read_arrays(spec, checkpoint.names(), checkpoint.load, checkpoint.where))
    spec = bounded_spec(spec, context)
    if spec.learned_positions:
        arrays["positions.weight"] = arrays["positions.weight"][: spec.max_seq_len + spec.position_offset]
    return DecoderWeights(spec=spec, arrays=arrays)
