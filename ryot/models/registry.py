"""Finds the family of a checkpoint: the module in `families/` that is named as its `model_type`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

from ryot.errors import CheckpointError, ConfigError
from ryot.models import families
from ryot.models.hf_config import HFConfig
from ryot.models.spec import DecoderSpec, Sizes

if TYPE_CHECKING:  # a recipe's sizes are checked without numpy
    from ryot.models.tensors import TensorMap


class Family(Protocol):
    """What a module in `families/` has."""

    def read_config(self, config: HFConfig) -> DecoderSpec:
        """The decoder that a `config.json` describes. Raises `CheckpointError` for one that is not computed here."""

    def write_config(self, spec: DecoderSpec) -> dict[str, object]:
        """`config.json` without token ids, from which `read_config` makes the same decoder again."""

    def tensor_maps(self, spec: DecoderSpec) -> Iterator[TensorMap]:
        """Every array of the decoder and the tensors that it comes from."""

    def unused_tensors(self, spec: DecoderSpec) -> tuple[str, ...]:
        """Names of tensors that a checkpoint may carry and that nothing reads, such as a mask."""

    def other_name(self, name: str) -> str:
        """Another name that checkpoints give the tensor `name`: that of the bare model, or an older one."""


def family_names() -> list[str]:
    """The `model_type` of every family."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__) if not module.name.startswith("_"))


def find_family(name: str, where: str) -> Family:
    """The family of this `model_type`. Raises `CheckpointError` naming those that there are."""
    if name not in family_names():
        wrapped = [family for family in family_names() if name in getattr(_module(family), "WRAPPED_IN", ())]
        if wrapped:
            raise CheckpointError(
                f"{where}: model_type is {name!r}, a text model with an encoder of images, which is not exported",
                hint=f"save its text model alone, whose model_type is {wrapped[0]}",
            )
        raise CheckpointError(f"{where}: model_type is {name!r}, expected one of {', '.join(family_names())}")
    return cast(Family, _module(name))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{families.__name__}.{name}")


def trained_spec(family: str, sizes: Sizes) -> DecoderSpec:
    """The decoder that recipes of this family train. Raises `ConfigError` for a family that none does."""
    trained = [name for name in family_names() if hasattr(_module(name), "trained_spec")]
    if family not in trained:
        raise ConfigError(f"architecture: got {family!r}, expected {' or '.join(trained)}")
    spec: DecoderSpec = _module(family).trained_spec(sizes)
    return spec


def read_spec(values: Mapping[str, object], where: str) -> DecoderSpec:
    """The decoder that the values of a `config.json` describe; `where` names it in messages."""
    config = HFConfig(values, where)
    family = find_family(config.text("model_type", ""), where)
    # transformers changes any key in single layers by this one.
    config.require(per_layer_config=None)
    try:
        return family.read_config(config)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def write_config(spec: DecoderSpec) -> dict[str, object]:
    """`config.json` of a decoder, without token ids."""
    return find_family(spec.family, spec.family).write_config(spec)


def tensor_maps(spec: DecoderSpec) -> list[TensorMap]:
    """Every array of a decoder and the Hugging Face tensors that it comes from."""
    return list(find_family(spec.family, spec.family).tensor_maps(spec))
