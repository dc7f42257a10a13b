"""What users call models: paths and ids of the hub. Nothing is read, and nothing heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")


def find_source(source: str) -> str | None:
    """`source` as a run keeps it: a path made absolute, an id of the hub as it is; None for neither of them.

    A .gguf file counts where it is named, there or not.
    """
    path = Path(source).expanduser()
    if path.exists() or path.suffix == ".gguf":
        return str(path.absolute())
    return source if HUB_ID.match(source) else None


def name_source(source: str) -> str:
    """What tables and folders call a model: the last part of its path or id, without .gguf and revision."""
    path = Path(source).expanduser()
    name = path.resolve().name if path.exists() else source.partition("@")[0].rpartition("/")[2]
    return re.sub(r"[^\w.+-]+", "-", name.removesuffix(".gguf")).strip(".-") or "model"
