"""`layer_types` of a `config.json`: which layers attend to a sliding window.

Names, and what a missing list means to each family: transformers 5, `configuration_utils.py`. A window counts the
token itself, there as here (`sliding_window_overlay` in `masking_utils.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ryot.errors import CheckpointError
from ryot.models.hf_config import HFConfig
from ryot.models.spec import DecoderSpec

FULL, SLIDING = "full_attention", "sliding_attention"
#: "attention" is an old name.
_NAMES = {FULL: FULL, SLIDING: SLIDING, "attention": FULL}


def read_layer_types(config: HFConfig, default: Sequence[str]) -> list[str]:
    """The type of each layer; `default` has one per layer. Raises `CheckpointError` for an unknown one."""
    types = config.items("layer_types")
    if types is None:
        return list(default)
    if len(types) != len(default):
        raise CheckpointError(f"{config.where}: layer_types has {len(types)} entries, expected {len(default)}")
    names = []
    for name in types:
        if not isinstance(name, str) or name not in _NAMES:
            raise CheckpointError(f"{config.where}: layer_types has {name!r}, expected {FULL!r} or {SLIDING!r}")
        names.append(_NAMES[name])
    return names


def read_windows(config: HFConfig, types: Sequence[str], window: int | None) -> tuple[int, ...]:
    """`DecoderSpec.layer_windows` of these layers. Raises `CheckpointError` for a missing window."""
    if SLIDING not in types:
        return ()
    if window is None:
        raise CheckpointError(f"{config.where}: sliding_window is null, expected a whole number by layer_types")
    return tuple(window if name == SLIDING else 0 for name in types)


def write_windows(spec: DecoderSpec) -> dict[str, object]:
    """`layer_types` and `sliding_window` of a decoder."""
    windows = spec.layer_windows or (0,) * spec.num_layers
    return {
        "layer_types": [SLIDING if window else FULL for window in windows],
        "sliding_window": max(windows) or None,
    }
