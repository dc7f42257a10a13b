"""The C program of deploy/native, built once as it is shipped, and once with the compiler's checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.edge.tiny_bundle import write_bundle

from .native import FOLDER, Native


def build(folder: Path, *variables: str) -> Path:
    if not (shutil.which("cc") and shutil.which("make")):
        pytest.skip("there is no C compiler, or no make")
    command = ["make", "-C", FOLDER, "-j2", f"BUILD={folder}", f"PYTHON={sys.executable}", *variables]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def native(built: Path) -> Native:
    return Native(built)


@pytest.fixture(scope="session")
def checked(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Native:
    """The program that stops at the first access outside its memory, leak of it, or undefined arithmetic."""
    folder = tmp_path_factory.mktemp("checked")
    shutil.copy(built / "unicode_tables.h", folder)
    os.utime(folder / "unicode_tables.h")
    return Native(build(folder, "SANITIZE=address,undefined", "CFLAGS=-O1", f"{folder}/ryot-run"))


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny bundle; read-only."""
    return lambda **kind: write_bundle(tmp_path_factory.mktemp("bundles") / "bundle", **kind)
