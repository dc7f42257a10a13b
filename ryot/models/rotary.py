"""Rotary positions: what a model says about them; `angles.py` makes the angles of it.

Channel i of the first half of a head's rotated channels is paired with channel i of the second half and turned by
`position * frequency[i]`. Scalings change the frequencies so that a model serves more positions than it was trained on:

    linear    all frequencies divided by the factor
    llama3    low frequencies divided, high ones kept, a blend between (Llama 3.1's `rope_scaling`)
    yarn      a blend by dimension, and cosines and sines scaled (Peng et al. 2023, arXiv:2309.00071)
    dynamic   nothing up to `max_position_embeddings`, which is as far as a context goes here
    longrope  each frequency divided by its own short factor, cosines and sines scaled (arXiv:2402.13753); the
              long factors serve more than `original_max_position_embeddings` tokens, where a context ends here
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ryot.errors import CheckpointError
from ryot.models.hf_config import HFConfig

Scaling = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]

#: Keys of `rope_parameters` that each scaling reads; those of `_REQUIRED` must be there.
_SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_BASE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotary:
    """The rotary positions of some layers."""

    theta: float
    """Base of the frequencies."""
    dim: int
    """Channels of a head that are rotated; the rest stay as they are."""
    scaling: Scaling = "default"
    factor: float = 1.0
    original_max_seq_len: int = 0
    """Context before scaling (llama3, yarn, longrope)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether yarn's limits are rounded to whole dimensions."""
    magnitude: float = 1.0
    """Factor on cosines and sines (yarn, longrope)."""
    short_factors: tuple[float, ...] = ()
    """What each frequency is divided by (longrope)."""


def read_rotary(config: HFConfig, head_dim: int, *, theta: float = 10_000.0) -> Rotary:
    """The rotary positions of a `config.json` of a family that rotates whole heads; `theta` is its default.

    Raises `CheckpointError` for a scaling, or a key of it, that is not known.
    """
    table = rope_table(config, {"rope_theta": theta, "partial_rotary_factor": 1.0})
    rotary = build_rotary(table, config, head_dim)
    if rotary.dim != head_dim:
        factor = table["partial_rotary_factor"]
        raise CheckpointError(f"{config.where}: partial_rotary_factor is {factor!r}, expected 1 (whole heads)")
    return rotary


def rope_table(config: HFConfig, defaults: Mapping[str, float]) -> dict[str, object]:
    """`rope_parameters` of transformers 5, or `rope_scaling` with what stands beside it; `defaults` by those keys."""
    outer = {key: config.number(key, default) for key, default in defaults.items()}
    return {**outer, **(config.table("rope_scaling") or config.table("rope_parameters") or {})}


def build_rotary(values: Mapping[str, object], config: HFConfig, head_dim: int, *, original_length: int = 0) -> Rotary:
    """The rotary positions that one table of parameters describes; `original_length` is used where no key gives one."""
    parameters = HFConfig(values, f"{config.where}: rope_parameters")
    scaling = parameters.text("rope_type", parameters.text("type", "default"))
    if scaling not in get_args(Scaling):
        raise CheckpointError(
            f"{config.where}: rope_type is {scaling!r}, expected one of {', '.join(get_args(Scaling))}"
        )
    parameters.refuse_others(
        (*_BASE_KEYS, *_SCALING_KEYS[scaling]), allow_if_default=("original_max_position_embeddings",)
    )
    for key in _REQUIRED.get(scaling, ()):
        if not parameters.has(key):
            raise CheckpointError(f"{parameters.where}: {key} is missing, expected by rope_type {scaling!r}")
    context = config.integer("max_position_embeddings", 2048)
    original = (
        config.integer("original_max_position_embeddings", 0)
        or original_length
        or parameters.integer("original_max_position_embeddings", context)
    )
    rotary = Rotary(
        theta=parameters.number("rope_theta", 10_000.0),
        dim=int(head_dim * parameters.number("partial_rotary_factor", 1.0)),
        scaling=scaling,  # type: ignore[arg-type]
    )
    if scaling in ("default", "dynamic"):
        return rotary
    factor = parameters.number("factor", 0.0) if parameters.has("factor") else context / original
    if factor <= 0:
        raise CheckpointError(f"{parameters.where}: factor is {factor!r}, expected a number above 0")
    match scaling:
        case "linear":
            return dataclasses.replace(rotary, factor=factor)
        case "llama3":
            return dataclasses.replace(
                rotary,
                factor=factor,
                original_max_seq_len=original,
                low_freq_factor=parameters.number("low_freq_factor", 0.0),
                high_freq_factor=parameters.number("high_freq_factor", 0.0),
            )
        case "longrope":
            short = parameters.numbers("short_factor")
            if len(short) != rotary.dim // 2:
                raise CheckpointError(
                    f"{parameters.where}: short_factor has {len(short)} numbers, expected {rotary.dim // 2}"
                )
            magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            return dataclasses.replace(
                rotary,
                original_max_seq_len=original,
                short_factors=short,
                magnitude=_optional(parameters, "attention_factor", magnitude),
            )
        case _:
            return dataclasses.replace(
                rotary,
                factor=factor,
                original_max_seq_len=original,
                beta_fast=_optional(parameters, "beta_fast", 32.0),
                beta_slow=_optional(parameters, "beta_slow", 1.0),
                truncate=parameters.flag("truncate", True),
                magnitude=_yarn_magnitude(parameters, factor),
            )


def write_rotary(rotary: Rotary, head_dim: int) -> dict[str, object]:
    """The keys of a `config.json` from which `read_rotary` makes the same again, here and in transformers 4 and 5."""
    values: dict[str, object] = {"rope_theta": rotary.theta}
    if rotary.dim != head_dim:
        values["partial_rotary_factor"] = rotary_fraction(rotary, head_dim)
    if rotary.scaling != "default":
        values["rope_scaling"] = scaling_table(rotary)
    return values


def rotary_fraction(rotary: Rotary, head_dim: int) -> float:
    """The part of a head's channels that is rotated, so that its product with `head_dim` is not rounded down below."""
    fraction = rotary.dim / head_dim
    return fraction if int(head_dim * fraction) == rotary.dim else math.nextafter(fraction, 2.0)


def scaling_table(rotary: Rotary) -> dict[str, object]:
    """The scaling as `rope_scaling` holds it."""
    known: dict[str, object] = {
        "factor": rotary.factor,
        "original_max_position_embeddings": rotary.original_max_seq_len,
        "low_freq_factor": rotary.low_freq_factor,
        "high_freq_factor": rotary.high_freq_factor,
        "beta_fast": rotary.beta_fast,
        "beta_slow": rotary.beta_slow,
        "truncate": rotary.truncate,
        "attention_factor": rotary.magnitude,
        "short_factor": list(rotary.short_factors),
        # No context reaches where the long ones are used.
        "long_factor": list(rotary.short_factors),
    }
    return {"rope_type": rotary.scaling} | {key: known[key] for key in _SCALING_KEYS[rotary.scaling] if key in known}


def _yarn_magnitude(parameters: HFConfig, factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    one, all_dims = (_optional(parameters, key, 0.0) for key in ("mscale", "mscale_all_dim"))
    default = magnitude(one) / magnitude(all_dims) if one and all_dims else magnitude(1.0)
    return _optional(parameters, "attention_factor", default)


def _optional(parameters: HFConfig, key: str, default: float) -> float:
    return parameters.number(key, default) if parameters.has(key) else default
