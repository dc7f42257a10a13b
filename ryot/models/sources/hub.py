"""A model of the Hugging Face hub, downloaded into the hub's own cache; what cannot be had is told in one line.

Nothing of an answer or of a request is repeated in a message, so no token can get into a log.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from ryot.errors import CheckpointError

#: What a checkpoint is read from; a repository may hold the same weights in five formats more.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
logger = logging.getLogger(__name__)


def fetch_from_hub(source: str) -> tuple[Path, str]:
    """The local folder and the commit of `org/name[@revision]`; downloads what is not in the cache yet.

    Without a network, or with HF_HUB_OFFLINE=1, the cache alone is looked at. Raises `CheckpointError` when the model
    is not there, closed, or larger than the disk.
    """
    # Read when the package is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"model {source}: the hub needs the huggingface_hub package",
            hint="pip install 'ryot[hub]', or download the model and give its folder",
        ) from error
    name, _, revision = source.partition("@")
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision or None, files_metadata=True, timeout=30.0)
        _check_files(source, [file.rfilename for file in info.siblings or ()])
        wanted = {file.rfilename: file.size or 0 for file in info.siblings or () if _is_wanted(file.rfilename)}
        _check_disk(source, Path(huggingface_hub.constants.HF_HUB_CACHE), sum(wanted.values()))
        logger.info("model %s: %.1f MB from the hub, less what is cached", source, sum(wanted.values()) / 1e6)
        # By its name and not by the commit, so that the cache can tell without a network what the name meant.
        folder = huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(PATTERNS))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"model {source}: is gated, and you are not (or not known to be) among those who may read it",
            hint="accept its terms on its page, then log in with 'hf auth login' or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"model {source}: has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"model {source}: no such folder here, and not found on the hub",
            hint="check its name; for a private model log in with 'hf auth login' or set HF_TOKEN",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "unknown"
        raise CheckpointError(f"model {source}: the hub answered with status {status}", hint="try again") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        return _from_cache(source, name, revision, error)
    return Path(folder), Path(folder).name


def _from_cache(source: str, name: str, revision: str, reason: Exception) -> tuple[Path, str]:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=list(PATTERNS), local_files_only=True
            )
        )
    except errors.LocalEntryNotFoundError:
        offline = isinstance(reason, errors.OfflineModeIsEnabled)
        raise CheckpointError(
            f"model {source}: no such folder here, not in the cache, and the hub cannot be reached"
            + (" (HF_HUB_OFFLINE is set)" if offline else f" ({type(reason).__name__})"),
            hint="unset HF_HUB_OFFLINE" if offline else "check the network, or give a folder or a .gguf file",
        ) from reason
    logger.warning("model %s: the hub cannot be reached, so the cached commit %s is used", source, folder.name)
    return folder, folder.name


def _check_files(source: str, names: list[str]) -> None:
    if any(name.endswith(".safetensors") and _is_wanted(name) for name in names):
        return
    if gguf := [name for name in names if name.endswith(".gguf")]:
        raise CheckpointError(
            f"model {source}: holds only GGUF files", hint=f"download one ({gguf[0]} for example) and give its path"
        )
    raise CheckpointError(
        f"model {source}: has no model.safetensors, and pickles are refused",
        hint="look for a revision or a copy of it with safetensors",
    )


def _check_disk(source: str, cache: Path, num_bytes: int) -> None:
    """Half of it may be cached already, but what does not fit at all is told before the download."""
    folder = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise CheckpointError(
            f"model {source}: needs {num_bytes / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free",
            hint="set HF_HOME to a larger disk",
        )


def _is_wanted(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in PATTERNS) and "/" not in name
