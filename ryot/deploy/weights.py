"""The weights of a decoder as numpy arrays, and what they are the weights of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ryot.models.spec import DecoderSpec, linear_names, table_names
from ryot.models.tensors import FloatArray
from ryot.train.checkpoint import load_decoder_arrays, read_checkpoint_spec


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


def load_decoder_weights(checkpoint: Path) -> DecoderWeights:
    """Read `config.json` and `model.safetensors` of a checkpoint folder.

    Raises `CheckpointError` for a family, a key or a tensor name that is not known, a head size that the runtime cannot
    take, a file that is missing or cut short, a shape that does not fit the config, and values that are not finite.
    """
    spec = read_checkpoint_spec(checkpoint)
    return DecoderWeights(spec=spec, arrays=load_decoder_arrays(checkpoint, spec))
