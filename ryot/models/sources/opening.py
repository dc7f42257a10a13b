"""Whatever a user names as a model: a folder, a GGUF file, an id of the hub."""

from __future__ import annotations

from pathlib import Path

from ryot.errors import CheckpointError, ConfigError
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.sources.folder import open_folder
from ryot.models.sources.naming import HUB_ID


def open_checkpoint(source: str) -> Checkpoint:
    """The checkpoint at `source`: a Hugging Face folder, a .gguf file, or `org/name[@revision]` of the hub.

    What lies on disk goes first. Weights are read later, tensor by tensor. Raises `ConfigError` when `source` is none
    of the three, and `CheckpointError` in one line for one that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return open_folder(path)
    if path.is_file() or path.suffix == ".gguf":
        return _open_file(path)
    if not HUB_ID.match(source):
        raise ConfigError(
            f"model {source}: no such folder or file, and no hub id",
            hint="give a folder, a .gguf file, or org/name[@revision]",
        )
    from ryot.models.sources.hub import fetch_from_hub

    folder, revision = fetch_from_hub(source)
    return open_folder(folder, where=source, revision=revision)


def _open_file(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(f"checkpoint {path}: no such file")
    if path.suffix != ".gguf":
        raise CheckpointError(
            f"checkpoint {path}: is a file, expected a folder or a .gguf file",
            hint="give the folder that holds it" if path.suffix in (".safetensors", ".json") else None,
        )
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {path}: GGUF files need the gguf package", hint="pip install 'ryot[export]'"
        ) from error
    from ryot.models.sources.gguf_reader import open_gguf

    return open_gguf(path)
