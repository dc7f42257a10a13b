"""Tiny checkpoints of every family, each made once, and the real parts where they have been fetched."""

from __future__ import annotations

import os

# Nothing here may look for a hub but the tests of it, which name their own server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.sources.tiny import save_model
from tests.realmodel import realmodel_folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The saved checkpoint of a family; tests that change it copy it."""
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = save_model(name, tmp_path_factory.mktemp("tiny") / "model")
        return made[name]

    return folder_of


@pytest.fixture
def llama_folder(family_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Llama of one's own to break."""
    return Path(shutil.copytree(family_folder("llama"), tmp_path / "llama"))


@pytest.fixture(scope="session")
def llama_cpp_source() -> Path:
    """llama.cpp's converter and vocabularies."""
    return _real("llama.cpp")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return _real("smollm2.gguf")


@pytest.fixture(scope="session")
def llama_server() -> str:
    """llama.cpp's server, where somebody has built it."""
    program = os.environ.get("RYOT_LLAMA_SERVER") or shutil.which("llama-server")
    if program is None:
        pytest.skip("llama.cpp's llama-server is neither on PATH nor named by RYOT_LLAMA_SERVER")
    return program


def _real(name: str) -> Path:
    path = realmodel_folder() / name
    if not path.exists():
        pytest.skip(f"{path} is not there; fetch it with: python tests/realmodel.py")
    return path
