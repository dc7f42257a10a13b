"""Beginnings that a server knows, kept over its end: one file per model, whose name is the model's hash.

The file holds tokens of prompts, so only its owner may read it. What is not a file of this model is passed over.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ryot.edge.bundle import MANIFEST_NAME, Bundle, hash_file
from ryot.edge.prefix_cache import PrefixCache, SavedBlock
from ryot.errors import ConfigError

_log = logging.getLogger(__name__)

SCHEMA = 1


def prefix_path(folder: Path, bundle: Bundle) -> Path:
    """Where the beginnings of a model lie; the manifest holds the hash of every file of it."""
    return folder / f"{hash_file(bundle.path / MANIFEST_NAME)}.prefixes"


def save_prefixes(cache: PrefixCache, path: Path) -> None:
    """Write the file whole, or leave it as it was. Raises `ConfigError` where that cannot be."""
    blocks = cache.blocks()
    head = {
        "schema": SCHEMA,
        "blocks": [[block.owner, block.parent, block.tokens] for block in blocks],
        "dtype": blocks[0].values.dtype.name if blocks else "",
    }
    draft = path.with_suffix(".draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for block in blocks:
                file.write(np.ascontiguousarray(block.values).data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def load_prefixes(cache: PrefixCache, path: Path, shape: tuple[int, int, int], dtype: np.dtype) -> int:
    """Fill an empty cache with a file's blocks of [2 * layers, K, tokens, H]; how many tokens that is.

    `shape` is that without the tokens. A file that is damaged is passed over with a warning.
    """
    try:
        with path.open("rb") as file:
            blocks = list(_read_blocks(file, shape, dtype))
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        _log.warning("%s: is passed over (%s)", path, error)
        return 0
    cache.restore(blocks)
    return sum(len(block.tokens) for block in blocks)


def _read_blocks(file: BinaryIO, shape: tuple[int, int, int], dtype: np.dtype) -> Iterator[SavedBlock]:
    """The blocks of a file. Raises `ValueError` for one that does not fit this model, or is cut short."""
    head = json.loads(file.readline())
    if head["schema"] != SCHEMA or (head["blocks"] and head["dtype"] != dtype.name):
        raise ValueError("it was written by another version, or for another model")
    layers, heads, width = shape
    for number, (owner, parent, tokens) in enumerate(head["blocks"]):
        if not tokens or not -1 <= parent < number:
            raise ValueError(f"block {number} follows none before it")
        size = (layers, heads, len(tokens), width)
        data = file.read(int(np.prod(size)) * dtype.itemsize)
        yield SavedBlock(str(owner), parent, tuple(tokens), np.frombuffer(data, dtype).reshape(size))
    if file.read(1):
        raise ValueError("it holds more than it says")
