"""Fixtures of the fleet tests: two versions of a bundle, a host behind a real sshd, and pushes to it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ryot.deploy.bundle import write_manifest
from ryot.deploy.signing import load_key, make_key, sign_bundle
from ryot.fleet.inventory import Host
from ryot.fleet.push import PushOptions, PushResult, prepare, push_all
from tests.device_bundle import write_device_bundle
from tests.fleet.sshd import Sshd, is_sshd_there

Push = Callable[..., PushResult]


@pytest.fixture(scope="session")
def version_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only."""
    return write_device_bundle(tmp_path_factory.mktemp("one") / "bundle")


@pytest.fixture(scope="session")
def version_2(version_1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with another name and one file changed; read-only."""
    folder = Path(shutil.copytree(version_1, tmp_path_factory.mktemp("two") / "bundle"))
    (folder / "requirements.txt").write_text((folder / "requirements.txt").read_text() + "# the second\n")
    return rewrite_manifest(folder, name="tiny-second")


def rewrite_manifest(folder: Path, **fields: object) -> Path:
    write_manifest(folder, json.loads((folder / "ryot_manifest.json").read_text()) | fields)
    return folder


@pytest.fixture(scope="session")
def owner_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "owner.pem"
    (path.parent / "trusted").write_text(f"trusted {make_key(path)} owner\n")
    return path


@pytest.fixture(scope="session")
def signed_1(version_1: Path, owner_key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(version_1, tmp_path_factory.mktemp("signed") / "bundle"))
    sign_bundle(folder, load_key(owner_key), 5)
    return folder


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if not is_sshd_there():
        pytest.skip("OpenSSH's server is not installed")
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder on the host."""
    return tmp_path / "device"


@pytest.fixture
def push(sshd: Sshd, root: Path, tmp_path: Path) -> Push:
    """Pushes a bundle to the host, whose Python is this one: it has the packages."""

    def push(bundle: Path, *, host: dict[str, Any] | None = None, **options: Any) -> PushResult:
        values = {"name": "host", "root": str(root), "python": sys.executable, **(host or {})}
        options = {"rounds": 0, "ssh_config": sshd.config, **options}
        [result] = push_all(
            prepare(bundle, None), [Host(**values)], PushOptions(**options), jobs=1, scratch=tmp_path / "scratch",
            tell=lambda host, what: None,
        )  # fmt: skip
        return result

    return push


def run_current(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the device's owner runs."""
    command = [root / "current" / "run", *(arguments or ("--verify",))]
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, env=plain_environment()
    )


def plain_environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"]}


def ryot(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from ryot.cli.main import run; run()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
